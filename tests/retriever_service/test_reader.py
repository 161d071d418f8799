"""Corpora as streams of records."""

import errno
import gzip
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from retriever_service.errors import BuildError
from retriever_service.ingest.reader import CorpusFormat, CorpusReader
from tests.retriever_service.tiny_models import embeddings_of


def write(tmp_path: Path, name: str, text: str) -> Path:
    file = tmp_path / name
    file.write_text(text, encoding="utf-8", newline="")
    return file


def test_jsonl_gives_records_with_defaults(tmp_path: Path) -> None:
    file = write(
        tmp_path,
        "c.jsonl",
        '{"text": "a"}\n\n{"key": 7, "title": null, "text": "b\\u0000 🦉", "metadata": {"z": 1, "a": "ü"}}\r\n'
        '{"key": "k", "title": "T", "text": "c", "embedding": [1, 2.5]}',
    )
    first, second, third = list(CorpusReader(file))
    assert (first.key, first.title, first.text, first.embedding) == (None, "", "a", None)
    assert (second.key, second.text, second.metadata) == ("7", "b\0 🦉", '{"a": "ü", "z": 1}')
    assert second.where.endswith("c.jsonl, line 3")
    assert third.embedding is not None
    assert third.embedding.tolist() == [1, 2.5]


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ("[1]", "must be a JSON object, got list"),
        ("{}", "text is missing"),
        ('{"text": 5}', "text must be a string, got int"),
        ('{"text": ""}', "text is empty"),
        ('{"text": "x", "title": []}', "title must be a string"),
        ('{"text": "x", "key": ""}', "key is empty"),
        ('{"text": "x", "key": true}', "key must be a string"),
        ('{"text": "x", "key": 1.5}', "key must be a string"),
        ('{"text": "\\ud800"}', "text is not valid Unicode"),
        ('{"text": "x", "metadata": "y"}', "metadata must be an object"),
        (
            '{"text": "x", "metadata": {"a": ' + 24 * "[" + 24 * "]" + "}}",
            "metadata is nested more than 24 levels deep",
        ),
        (json.dumps({"text": "x", "metadata": {"n": 10**400}}), "metadata has an integer beyond ±1.8e+308"),
        (json.dumps({"text": "x", "metadata": {"a": [{"n": -(10**400)}]}}), "metadata has an integer beyond"),
        ('{"text": "x", "metadata": {"a": "\\ud800"}}', "metadata is not valid Unicode"),
        ('{"text": "x", "embedding": "y"}', "embedding must be a list of numbers"),
        ('{"text": "x", "embedding": []}', "embedding must be a list of numbers"),
        ('{"text": "x", "embedding": [[1]]}', "embedding must be a list of numbers"),
        ('{"text": "x", "embedding": [true, 1]}', "embedding must be a list of numbers"),
        ('{"text": "x", "embedding": ["3", "4"]}', "embedding must be a list of numbers"),
        ('{"text": "x", "embedding": [1, NaN]}', "embedding is not finite"),
        ('{"text": "x", "embedding": [1, 1e30]}', "embedding is longer than 1e+16"),
        ('{"text": "x", "embedding": [0, 0.0]}', "embedding is zero"),
        ('{"text": "x", "embeding": [1]}', "unknown field 'embeding'"),
        (json.dumps({"text": "x" * 201}), "text has 201 bytes, at most 200"),
    ],
)
def test_bad_line_is_named(tmp_path: Path, line: str, said: str) -> None:
    file = write(tmp_path, "c.jsonl", f'{{"text": "fine"}}\n{line}\n')
    with pytest.raises(BuildError) as caught:
        list(CorpusReader(file, max_text_bytes=200))
    assert f"{file}, line 2: " in caught.value.message
    assert said in caught.value.message


def test_tsv_is_read_as_psgs_w100(tmp_path: Path) -> None:
    text = 'id\ttext\ttitle\n1\t"said ""yes"" and\nleft"\tAaron\n2\tplain text\t"A ""B"""\n'
    first, second = list(CorpusReader(write(tmp_path, "p.tsv", text)))
    assert (first.key, first.text, first.title) == ("1", 'said "yes" and\nleft', "Aaron")
    assert (second.key, second.text, second.title) == ("2", "plain text", 'A "B"')
    assert second.where.endswith("line 4")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("1\ta\tb\n", "line 1: the header must be id, text, title"),
        ("id\ttext\ttitle\n1\ta\n", "line 2: must have 3 columns, got 2"),
        ('id\ttext\ttitle\n1\t"a\tb\n', "line 2: "),
        ("id\ttext\ttitle\n1\t\tb\n", "line 2: text is empty"),
    ],
)
def test_bad_tsv_row_is_named(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(BuildError, match=said):
        list(CorpusReader(write(tmp_path, "p.tsv", text)))


def test_gzip_is_read_and_damage_in_it_is_an_error(tmp_path: Path) -> None:
    packed = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "c.jsonl.gz").write_bytes(packed)
    assert len(list(CorpusReader(tmp_path / "c.jsonl.gz"))) == 1000
    (tmp_path / "c.jsonl.gz").write_bytes(packed[:-20])
    with pytest.raises(BuildError, match=r"c\.jsonl\.gz: cannot be read"):
        list(CorpusReader(tmp_path / "c.jsonl.gz"))
    (tmp_path / "c.jsonl.gz").write_bytes(packed[:10] + b"\xff" * 20)
    with pytest.raises(BuildError, match=r"c\.jsonl\.gz: cannot be read"):
        list(CorpusReader(tmp_path / "c.jsonl.gz"))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.jsonl", b'{"text": "\xc3\xa9"}\n{"text": "\xe9"}\n'),
        ("c.jsonl.gz", b'{"text": "a"}\n{"text": "\xe9"}\n'),
        ("c.tsv", b"id\ttext\ttitle\n1\t\xe9\ta\n"),
    ],
)
def test_line_that_is_not_utf8_is_named(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    with pytest.raises(BuildError, match=f"{name}, line 2: is not UTF-8: byte 0xe9"):
        list(CorpusReader(tmp_path / name))


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("c.jsonl", b'{"text": "a"}\n'),
        ("c.jsonl.gz", b'{"text": "a"}\n'),
        ("c.tsv", b"id\ttext\ttitle\n1\ta\tb\n"),
    ],
)
def test_byte_order_mark_is_no_part_of_the_corpus(tmp_path: Path, name: str, content: bytes) -> None:
    marked = b"\xef\xbb\xbf" + content
    (tmp_path / name).write_bytes(gzip.compress(marked) if name.endswith(".gz") else marked)
    assert [record.text for record in CorpusReader(tmp_path / name)] == ["a"]


@pytest.mark.parametrize(
    ("name", "passage_words"),
    [("c.jsonl", None), ("c.jsonl.gz", None), ("c.tsv", None), ("c.jsonl", 20), ("pages", None), ("set", 20)],
)
def test_number_of_records_is_estimated_while_they_are_read_and_exact_in_the_end(
    tmp_path: Path, name: str, passage_words: int | None
) -> None:
    """The longest stage of a build showed neither how much is left nor how long that takes."""
    from datasets import Dataset

    rng = random.Random(0)
    texts = [" ".join(str(rng.random()) for _ in range(40)) for _ in range(3000)]
    lines = "".join(json.dumps({"text": text}) + "\n" for text in texts)
    file = tmp_path / name
    if name.endswith(".tsv"):
        file.write_text("id\ttext\ttitle\n" + "".join(f"{n}\t{text}\t\n" for n, text in enumerate(texts)))
    elif name == "pages":
        file.mkdir()
        for number, text in enumerate(texts):
            (file / f"{number}.txt").write_text(text)
    elif name == "set":
        Dataset.from_dict({"title": ["t"] * len(texts), "text": texts}).save_to_disk(file)
    else:
        file.write_bytes(gzip.compress(lines.encode()) if name.endswith(".gz") else lines.encode())
    reader = CorpusReader(file, passage_words=passage_words)
    assert (reader.count(), reader.estimated_count(0)) == (None, None)
    records = len(texts) * (1 if passage_words is None else 2)
    for number, _ in enumerate(reader, start=1):
        if number == records // 2:
            assert reader.estimated_count(number) == pytest.approx(records, rel=0.15)
    assert reader.estimated_count(number) == number == records


def test_format_is_told_by_name_or_by_the_caller(tmp_path: Path) -> None:
    file = write(tmp_path, "c.data", '{"text": "a"}\n')
    with pytest.raises(BuildError, match="cannot tell the format"):
        CorpusReader(file)
    assert len(list(CorpusReader(file, CorpusFormat.JSONL))) == 1
    with pytest.raises(BuildError, match="no corpus at"):
        CorpusReader(tmp_path / "nothing.jsonl")


def test_datasets_folder_keeps_embeddings_bit_for_bit(
    tmp_path: Path, documents: list[dict[str, Any]]
) -> None:
    from datasets import Dataset

    columns = {name: [document[name] for document in documents] for name in ("title", "text")}
    columns["embeddings"] = [document["embedding"] for document in documents]
    columns["id"] = [document["key"] for document in documents]
    Dataset.from_dict(columns).save_to_disk(tmp_path / "set")
    reader = CorpusReader(tmp_path / "set")
    records = list(reader)
    assert reader.count() == len(records) == len(documents)
    assert [record.key for record in records] == columns["id"]
    assert [record.text for record in records] == columns["text"]
    np.testing.assert_array_equal(
        np.stack([record.embedding for record in records]), embeddings_of(documents)
    )


@pytest.mark.parametrize(
    ("rows", "file", "content"),
    [(0, None, ""), (1, "state.json", "{}"), (1, "state.json", "{"), (1, "dataset_info.json", "[]")],
)
def test_datasets_folder_without_rows_or_with_damage_is_an_error(
    tmp_path: Path, rows: int, file: str | None, content: str
) -> None:
    from datasets import Dataset

    Dataset.from_dict({"title": ["t"] * rows, "text": ["x"] * rows}).save_to_disk(tmp_path)
    if file is not None:
        (tmp_path / file).write_text(content)
    with pytest.raises(BuildError, match=str(tmp_path)):
        list(CorpusReader(tmp_path))


def test_page_whose_name_is_not_utf8_is_named(tmp_path: Path) -> None:
    shutil.copy(write(tmp_path, "a.md", "text"), os.fsencode(tmp_path) + b"/\xff.md")
    reader = CorpusReader(tmp_path)
    assert reader.fingerprint() == CorpusReader(tmp_path).fingerprint()
    with pytest.raises(BuildError, match=r"\udcff\.md: key is not valid Unicode"):
        list(reader)


@pytest.mark.parametrize("call", [list, CorpusReader.fingerprint])
def test_folder_of_pages_that_cannot_be_read_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: Callable[[CorpusReader], object]
) -> None:
    """Its pages were left out, and nobody was told."""
    for folder in (tmp_path, tmp_path / "closed", tmp_path / ".hidden"):
        folder.mkdir(exist_ok=True)
        write(folder, "a.md", "text")
    scandir = os.scandir

    def refused(path: str | Path) -> Any:
        if Path(path).name in {"closed", ".hidden"}:
            raise PermissionError(errno.EACCES, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refused)
    with pytest.raises(BuildError, match="closed: cannot be read: Permission denied"):
        call(CorpusReader(tmp_path))
    (tmp_path / "closed" / "a.md").unlink()
    (tmp_path / "closed").rmdir()
    assert len(list(CorpusReader(tmp_path))) == 1


def test_folder_that_is_no_dataset_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BuildError, match="neither a datasets folder nor"):
        list(CorpusReader(tmp_path))
