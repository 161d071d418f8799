"""Write the trained generator as the float16 checkpoint folder: python -m demo.training.export --help."""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoTokenizer, BartForConditionalGeneration

from demo.assemble import LOCAL_TOKENIZER_KEYS, write_json

MAX_LENGTH = 24
NUM_BEAMS = 4


def average(folders: list[Path]) -> BartForConditionalGeneration:
    """Return the model whose weights are the mean of the folders' models."""
    models = [BartForConditionalGeneration.from_pretrained(folder, dtype=torch.float32) for folder in folders]
    states = [model.state_dict() for model in models]
    mean = {name: torch.stack([state[name] for state in states]).mean(0) for name in states[0]}
    models[0].load_state_dict(mean)
    return models[0]


def export(folders: list[Path], output: Path) -> None:
    """Average the folders' weights and write them in float16 with settings for short answers."""
    model = average(folders)
    settings = model.generation_config
    settings.max_length, settings.num_beams, settings.do_sample = MAX_LENGTH, NUM_BEAMS, False
    settings._from_model_config = False  # noqa: SLF001  Hugging Face would derive the settings anew
    model.to(torch.float16).save_pretrained(output)  # type: ignore[arg-type]
    AutoTokenizer.from_pretrained(folders[0]).save_pretrained(output)
    (output / "model.safetensors").chmod(0o644)
    path = output / "tokenizer_config.json"
    kept = json.loads(path.read_text(encoding="utf-8"))
    write_json(path, {key: value for key, value in kept.items() if key not in LOCAL_TOKENIZER_KEYS})


def main() -> None:
    """Run from the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--from", dest="folders", type=Path, nargs="+", required=True, help="checkpoints to average"
    )
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "checkpoint")
    options = parser.parse_args()
    export(options.folders, options.output)


if __name__ == "__main__":
    main()
