"""Passage encoders, and the rag-index command that uses them."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from retriever_service.errors import DamagedIndexError
from retriever_service.ingest import cli
from tests.retriever_service.tiny_models import WORDS, wordpiece_tokenizer, write_jsonl

PASSAGES = [("title", " ".join(WORDS[:length])) for length in (3, 60, 1, 20, 7)]


def test_passages_of_like_length_share_a_batch(bert_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A long passage among short ones makes the whole batch as long as itself."""
    from retriever_service.ingest.embed import PassageEncoder

    encoder = PassageEncoder(str(bert_folder), batch_size=3, num_threads=1)
    encode, batches = PassageEncoder._encode_batch, []

    def watched(self: PassageEncoder, passages: Sequence[tuple[str, str]]) -> Any:
        batches.append([len(text) for _, text in passages])
        return encode(self, passages)

    monkeypatch.setattr(PassageEncoder, "_encode_batch", watched)
    texts = [("", "ab " * length) for length in (1, 9, 2, 8, 3, 7, 4)]
    encoder.encode(texts)
    assert batches == [[27, 24, 21], [12, 9, 6], [3]]


@pytest.mark.parametrize("pooling", ["mean", "cls", "pooler"])
@pytest.mark.parametrize("normalize", [True, False])
def test_encoder_pools_as_asked_in_any_order_and_batch(
    bert_folder: Path, pooling: str, normalize: bool
) -> None:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from retriever_service.ingest.embed import PassageEncoder, Pooling

    encoder = PassageEncoder(
        str(bert_folder), pooling=Pooling(pooling), normalize=normalize, batch_size=2, num_threads=1
    )
    embeddings = encoder.encode(PASSAGES)
    model, tokenizer = (
        AutoModel.from_pretrained(bert_folder).eval(),
        AutoTokenizer.from_pretrained(bert_folder),
    )
    for (title, text), embedding in zip(PASSAGES, embeddings, strict=True):
        inputs = tokenizer(f"{title} {text}", truncation=True, max_length=40, return_tensors="pt")
        with torch.inference_mode():
            output = model(**inputs)
        pooled = {
            "mean": output.last_hidden_state[0].mean(0),
            "cls": output.last_hidden_state[0, 0],
            "pooler": output.pooler_output[0],
        }[pooling]
        expected = pooled / pooled.norm() if normalize else pooled
        np.testing.assert_allclose(embedding, expected.numpy(), atol=1e-5)
    described = encoder.description()
    assert described.name.startswith("tiny-bert@sha256:")
    assert described.digest is not None
    assert described.digest.startswith(described.name.partition("@")[2])
    assert described.max_length == 40


def test_dpr_context_encoder_takes_title_and_text_as_a_pair(tmp_path: Path) -> None:
    import torch
    from transformers import DPRConfig, DPRContextEncoder

    from retriever_service.ingest.embed import PassageEncoder

    tokenizer = wordpiece_tokenizer()
    config = DPRConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    model = DPRContextEncoder(config).eval()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    encoder = PassageEncoder(str(tmp_path), name="tiny-dpr")
    inputs = tokenizer(PASSAGES[0][0], PASSAGES[0][1], return_tensors="pt")
    with torch.inference_mode():
        expected = model(**inputs).pooler_output[0].numpy()
    np.testing.assert_allclose(encoder.encode(PASSAGES)[0], expected, atol=1e-5)
    assert encoder.description().name == "tiny-dpr"


def test_command_builds_verifies_and_describes(tmp_path: Path, corpus: Path, bert_folder: Path) -> None:
    run = CliRunner()
    lines = [{"title": title, "text": text} for title, text in PASSAGES]
    plain = write_jsonl(tmp_path / "c.jsonl", lines)
    arguments = ["build", "--input", str(plain), "--output", str(tmp_path / "index"), "--embedding-model"]
    done = run.invoke(cli.app, [*arguments, str(bert_folder), "--pooling", "mean", "--normalize"])
    assert done.exit_code == 0, done.output
    assert run.invoke(cli.app, ["verify", str(tmp_path / "index")]).exit_code == 0
    described = run.invoke(cli.app, ["info", "--json", str(tmp_path / "index")])
    manifest = json.loads(described.stdout)
    assert (manifest["ntotal"], manifest["dimension"], manifest["embedding"]["normalize"]) == (5, 12, True)
    (tmp_path / "index" / "generation-000001" / "index.faiss").write_bytes(b"")
    broken = run.invoke(cli.app, ["info", str(tmp_path / "index")])
    assert isinstance(broken.exception, DamagedIndexError)


@pytest.mark.parametrize(
    ("extra", "said"),
    [
        ([], "give --embedding-model"),
        (["--embedding-model", "/nowhere"], "no passage encoder in /nowhere"),
        (["--embedding-model", "x", "--pooling", "max"], "--pooling must be mean, cls or pooler"),
        (["--embedding-model-name", "m", "--kind", "Nonsense"], "faiss refuses kind"),
    ],
)
def test_command_says_in_one_line_what_is_wrong(
    tmp_path: Path,
    corpus: Path,
    extra: list[str],
    said: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = ["rag-index", "build", "--input", str(corpus), "--output", str(tmp_path / "index"), *extra]
    monkeypatch.setattr("sys.argv", arguments)
    with pytest.raises(SystemExit) as caught:
        cli.main()
    assert caught.value.code == 1
    assert f"rag-index: error: {said}" in capsys.readouterr().err
