"""`--engine ray`: the local engine's result from a pool of actors; skipped where Ray is not installed."""

import contextlib
import subprocess
import sys
from pathlib import Path
from unittest.mock import MagicMock

import pytest

from retriever_service.index.snapshot import Snapshot
from retriever_service.ingest.reader import CorpusReader
from tests.retriever_service.tiny_models import WORDS, wordpiece_tokenizer, write_jsonl

pytest.importorskip("ray", reason="the extra ray is not installed")

_LISTENERS = """
import sys, psutil
from retriever_service.ingest.ray_encoder import RayOptions, _ray
with _ray(RayOptions(None, 1, 1, False)):
    me = psutil.Process()
    for process in (me, *me.children(recursive=True)):
        for connection in process.net_connections(kind="inet"):
            if connection.status == "LISTEN":
                print(connection.laddr.ip)
"""


def test_ray_of_this_machine_listens_on_loopback_only() -> None:
    pytest.importorskip("psutil")
    told = subprocess.run(
        [sys.executable, "-c", _LISTENERS], check=False, capture_output=True, text=True, timeout=120
    )
    addresses = set(told.stdout.split())
    assert addresses, told.stderr
    assert addresses <= {"127.0.0.1", "::ffff:127.0.0.1", "::1"}


def test_what_a_cluster_reads_is_named_by_absolute_paths(
    tmp_path: Path, bert_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its processes were started in another directory: what the command line named was not there."""
    from retriever_service.ingest import ray_encoder

    corpus = write_jsonl(tmp_path / "c.jsonl", [{"text": "a"}])
    monkeypatch.chdir(bert_folder.parent)
    options = ray_encoder.RayOptions(None, 1, 1, False)
    encoder = ray_encoder.RayEncoder({"source": bert_folder.name, "device": "cuda"}, options)
    assert encoder._encoder["source"] == str(bert_folder)
    read: list[Path] = []

    def reading(data: object, corpus: CorpusReader, first_row: int) -> None:
        read.append(corpus.path)
        raise KeyboardInterrupt

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(ray_encoder, "_ray", lambda options: contextlib.nullcontext(MagicMock()))
    monkeypatch.setattr(ray_encoder, "_datasource", reading)
    with pytest.raises(KeyboardInterrupt):
        next(encoder.encode_corpus(CorpusReader(Path("c.jsonl")), 0))
    assert read == [corpus]


def test_ray_gives_the_local_engines_index(tmp_path: Path) -> None:
    import torch
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    tokenizer = wordpiece_tokenizer()
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=12,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=24,
    )
    BertModel(config).save_pretrained(tmp_path / "bert")
    tokenizer.save_pretrained(tmp_path / "bert")
    lines = [{"title": WORDS[row % 50], "text": " ".join(WORDS[: 1 + row % 40])} for row in range(1300)]
    corpus = write_jsonl(tmp_path / "c.jsonl", lines)
    for engine in ("local", "ray"):
        command = [
            *(sys.executable, "-m", "retriever_service.ingest.cli", "build", f"--engine={engine}"),
            *(f"--input={corpus}", f"--output={tmp_path / engine}"),
            *(f"--embedding-model={tmp_path / 'bert'}", "--threads=1"),
        ]
        told = subprocess.run(command, check=False, capture_output=True, text=True, timeout=200)
        assert told.returncode == 0, told.stderr
    local, ray = (Snapshot.open(tmp_path / engine).manifest for engine in ("local", "ray"))
    assert ray.files == local.files
    assert ray.embedding == local.embedding
