"""The assembled checkpoint is what Hugging Face loads, whole, and the same on each run."""

import hashlib
import json
from pathlib import Path

import pytest

from demo.assemble import GENERATOR_DIR, assemble

pytestmark = pytest.mark.skipif(
    not (GENERATOR_DIR / "model.safetensors").exists(), reason="the generator's weights are not checked out"
)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return assemble(tmp_path_factory.mktemp("demo") / "checkpoint")


def digests(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_assemble_gives_the_same_bytes_and_replaces_an_older_folder(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    (tmp_path / "again" / "left_over.txt").write_text("old")
    again = assemble(tmp_path / "again")
    assert digests(again) == digests(checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["again"]


def test_assemble_leaves_nothing_behind_when_it_fails(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="holds no model"):
        assemble(tmp_path / "out", generator_dir=tmp_path / "missing")
    assert list(tmp_path.iterdir()) == []


def test_config_carries_the_settings_that_hugging_face_has_no_field_for(checkpoint: Path) -> None:
    config = json.loads((checkpoint / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["RagTokenForGeneration"]
    assert config["title_sep"] == " / "
    assert config["doc_sep"] == " // "
    assert config["ragpair"]["pooling"] == "mean"
    assert config["ragpair"]["score_scale"] > 1


def test_hugging_face_loads_every_weight(checkpoint: Path) -> None:
    from transformers import RagTokenForGeneration

    model, info = RagTokenForGeneration.from_pretrained(checkpoint, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    assert model.config.n_docs == 5


def test_both_tokenizers_load_and_neither_cuts_nor_pads(checkpoint: Path) -> None:
    from transformers import RagTokenizer

    tokenizer = RagTokenizer.from_pretrained(checkpoint)
    text = "word " * 200
    assert len(tokenizer.generator(text)["input_ids"]) == 202
    assert len(tokenizer.question_encoder(text)["input_ids"]) == 202
    for part in ("generator", "question_encoder"):
        saved = json.loads((checkpoint / f"{part}_tokenizer" / "tokenizer.json").read_text(encoding="utf-8"))
        assert saved["truncation"] is None
        assert saved["padding"] is None
