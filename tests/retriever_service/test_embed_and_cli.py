"""Passage encoders, and the rag-index command that uses them."""

import contextlib
import json
import sqlite3
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from retriever_service.errors import BuildError, DamagedIndexError
from retriever_service.ingest import cli
from retriever_service.store.filter_indexes import indexed_fields
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


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"device": "banana"}, "device 'banana' cannot be used"),
        ({"device": "cuda:99"}, "device 'cuda:99' cannot be used"),
        ({"max_length": 41}, "has positions for 40 tokens, max_length is 41"),
        ({"template": "{titel}"}, r"must hold \{title\} or \{text\}, got '\{titel\}'"),
    ],
)
def test_settings_that_a_passage_encoder_cannot_have_are_refused_at_start(
    bert_folder: Path, given: dict[str, Any], said: str
) -> None:
    """They ended in tracebacks, or every passage was embedded as the same."""
    from retriever_service.ingest.embed import PassageEncoder

    with pytest.raises(BuildError, match=said):
        PassageEncoder(str(bert_folder), **given)


def test_an_encoder_without_a_pooler_is_a_clear_error(tmp_path: Path) -> None:
    from transformers import BartConfig, BartModel

    from retriever_service.ingest.embed import PassageEncoder, Pooling

    tokenizer = wordpiece_tokenizer()
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=12,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=24,
        decoder_ffn_dim=24,
        max_position_embeddings=40,
    )
    BartModel(config).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(BuildError, match="has no pooler: choose --pooling mean or cls"):
        PassageEncoder(str(tmp_path), pooling=Pooling.POOLER).encode(PASSAGES)


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


def test_paths_are_printed_whole_and_as_they_are(
    tmp_path: Path, corpus: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Brackets were taken for rich's markup, and 80 columns broke a line where no terminal is."""
    monkeypatch.setenv("COLUMNS", "40")
    folder = tmp_path / f"my [draft] index{'x' * 60}" / "a[" / "b] [bold]"
    run = CliRunner()
    arguments = ["build", "--input", str(corpus), "--output", str(folder), "--embedding-model-name", "m[/b]"]
    done = run.invoke(cli.app, arguments)
    assert done.exit_code == 0, done.output
    whole = f"{folder / 'generation-000001'}: whole, 60 documents"
    for command, line in (
        ("verify", whole),
        ("repair", whole.replace(": whole", ": was whole: nothing to repair")),
        ("info", str(folder / "generation-000001")),
    ):
        shown = run.invoke(cli.app, [command, str(folder)])
        assert shown.exit_code == 0, shown.output
        assert line in shown.output.splitlines()
    assert "m[/b]" in shown.output
    assert str(folder / "generation-000001") in done.output.splitlines()


def test_filter_indexes_may_stand_apart(tmp_path: Path) -> None:
    """ " lang" was indexed, a field that no document has."""
    line = {"text": "a", "embedding": [1.0], "metadata": {"year": 1, "lang": "en"}}
    file = write_jsonl(tmp_path / "c.jsonl", [line])
    arguments = ["build", "--input", str(file), "--output", str(tmp_path / "index")]
    done = CliRunner().invoke(
        cli.app, [*arguments, "--embedding-model-name", "m", "--filter-indexes", " year, lang "]
    )
    assert done.exit_code == 0, done.output
    documents = tmp_path / "index" / "generation-000001" / "documents.sqlite"
    with contextlib.closing(sqlite3.connect(documents)) as connection:
        assert indexed_fields(connection, "main") == {"year", "lang"}


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
