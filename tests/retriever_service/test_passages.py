"""Passages of whole sentences, and pages of Markdown and text."""

import json
import random
from pathlib import Path

import pytest

from retriever_service.errors import BuildError
from retriever_service.ingest.pages import markdown_page
from retriever_service.ingest.passages import split_text
from retriever_service.ingest.reader import CorpusReader
from tests.retriever_service.tiny_models import WORDS


def test_passages_are_whole_sentences_and_lose_nothing() -> None:
    rng = random.Random(0)
    sentences = [
        " ".join(rng.choices(WORDS, k=rng.randint(3, 40))).capitalize() + rng.choice(".?!")
        for _ in range(200)
    ]
    passages = list(split_text(" ".join(sentences), 100))
    assert " ".join(passages) == " ".join(sentences)
    assert all(passage[-1] in ".?!" for passage in passages)
    sizes = [len(passage.split()) for passage in passages]
    assert max(sizes) <= 100
    assert min(sizes[:-1]) > 50


@pytest.mark.parametrize(
    ("language", "text", "words", "passages"),
    [
        ("en", "Dr. A. Smith met Mr. Jones. They left.", 6, ["Dr. A. Smith met Mr. Jones.", "They left."]),
        (
            "de",
            "Am 3. Mai kam z. B. Dr. Müller. Er ging.",
            8,
            ["Am 3. Mai kam z. B. Dr. Müller.", "Er ging."],
        ),
        ("zh", "今天天气很好。我们去公园。你来。", 7, ["今天天气很好。", "我们去公园。", "你来。"]),
        ("hi", "यह एक वाक्य है। दूसरा वाक्य।", 4, ["यह एक वाक्य है।", "दूसरा वाक्य।"]),
        ("xx", "One two. Three four.", 2, ["One two.", "Three four."]),
        ("en", "a b c d e f g", 3, ["a b c", "d e f", "g"]),
        ("en", "x" * 60, 1, ["x" * 24, "x" * 24, "x" * 12]),
        ("en", " \n ", 3, []),
    ],
)
def test_sentences_end_where_the_language_ends_them(
    language: str, text: str, words: int, passages: list[str]
) -> None:
    assert list(split_text(text, words, language)) == passages


def test_megabyte_without_a_full_stop_is_cut_after_words() -> None:
    passages = list(split_text("word " * 200_000, 100))
    assert len(passages) == 2000
    assert {len(passage.split()) for passage in passages} == {100}


def test_passages_keep_title_and_metadata_and_get_stable_keys(tmp_path: Path) -> None:
    documents = [
        {"key": "k", "title": "T", "text": "One two three. Four five six.", "metadata": {"year": 1}},
        {"text": "Seven."},
    ]
    (tmp_path / "c.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    records = list(CorpusReader(tmp_path / "c.jsonl", passage_words=4))
    assert [(record.key, record.title, record.text, record.metadata) for record in records] == [
        ("k#1", "T", "One two three.", '{"year": 1}'),
        ("k#2", "T", "Four five six.", '{"year": 1}'),
        ("1#1", "", "Seven.", None),
    ]
    assert records[1].where.endswith("line 1, passage 2")


def test_embedding_of_a_whole_text_is_not_given_to_its_passages(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"text": "a", "embedding": [1]}\n')
    with pytest.raises(BuildError, match="line 1: has an embedding"):
        list(CorpusReader(tmp_path / "c.jsonl", passage_words=4))


def test_key_that_its_passage_number_makes_too_long_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text(json.dumps({"key": "k" * 1024, "text": "a"}))
    assert len(list(CorpusReader(tmp_path / "c.jsonl"))) == 1
    with pytest.raises(BuildError, match="line 1, passage 1: key has 1026 bytes, at most 1024"):
        list(CorpusReader(tmp_path / "c.jsonl", passage_words=4))


@pytest.mark.parametrize(
    ("content", "title", "text"),
    [
        ("# The *big* `city`\n\nFirst\nline.\n\n- one\n- two\n", "The big city", "First line.\n\none\n\ntwo"),
        ("Intro.\n\nTitle\n=====\nBody [link](http://x).", "Title", "Intro.\n\nBody link."),
        ("---\ntitle: From front\n---\n# Heading\ntext", "From front", "Heading\n\ntext"),
        ("---\n: [\n---\nx", None, ": [\n\nx"),
        ("---\ntitle: X\ndate: 2024-02-30\n---\nbody", "X", "body"),
        ("---\ntitle: yes\nn: !!int x\n---\nbody", "yes", "body"),
        ("---\ntitle: ~\n---\n# Heading\nbody", "Heading", "body"),
        (f"---\na: {1000 * '['}{1000 * ']'}\n---\nbody", f"a: {1000 * '['}{1000 * ']'}", "body"),
        ('---\na: "\\UFFFFFFFF"\n---\nbody', 'a: "\\UFFFFFFFF"', "body"),
        (
            "<details>\n<summary>More &amp; <b>mo</b>re</summary>\n\nHidden *text*\n\n</details>\n",
            None,
            "More & more\n\nHidden text",
        ),
        ('<p align="center">\n  Hello,\n  <a href="x">you</a><br>there\n</p>', None, "Hello, you there"),
        ("<!-- unseen -->\n\n<style>p {}</style>\n\n<script>\nx\n\ny\n</script>\n\ntext", None, "text"),
        (
            "```py\nx = 1\n```\n\n<b>no</b>\n\n| a | b |\n|---|---|\n| 1 | 2 |\n",
            None,
            "x = 1\n\nno\n\na\n\nb\n\n1\n\n2",
        ),
        ("", None, ""),
    ],
)
def test_markdown_page_gives_title_and_plain_text(content: str, title: str | None, text: str) -> None:
    found = markdown_page(content)
    if content.startswith("---\n: ["):
        assert found[0] is None or "[" in found[0]  # a broken front matter is text like any other
    else:
        assert found == (title, text)


def test_folder_of_pages_is_read_by_name(tmp_path: Path) -> None:
    (tmp_path / "deep" / ".git").mkdir(parents=True)
    (tmp_path / "b.txt").write_text("Plain text. More of it.", encoding="utf-8-sig")
    (tmp_path / "deep" / "a.md").write_text("# Heading\n\nBody.\n")
    (tmp_path / "deep" / ".git" / "c.md").write_text("# Hidden\n\nno\n")
    (tmp_path / "empty.md").write_text("\n")
    (tmp_path / "picture.png").write_bytes(b"\x89PNG")
    records = list(CorpusReader(tmp_path))
    assert [(record.key, record.title, record.text) for record in records] == [
        ("b.txt#1", "b", "Plain text. More of it."),
        ("deep/a.md#1", "Heading", "Body."),
    ]
    assert [record.key for record in CorpusReader(tmp_path / "b.txt")] == ["b.txt#1"]


def test_page_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_bytes(b"\xff\xfe\xff")
    with pytest.raises(BuildError, match=r"a\.md: cannot be read"):
        list(CorpusReader(tmp_path))


def test_fingerprint_changes_with_the_corpus_and_how_it_is_read(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# Heading\n\nBody.\n")
    first = CorpusReader(tmp_path).fingerprint()
    assert CorpusReader(tmp_path).fingerprint() == first
    assert CorpusReader(tmp_path, passage_words=50).fingerprint() != first
    (tmp_path / "b.md").write_text("# Heading\n\nBody.\n")
    assert CorpusReader(tmp_path).fingerprint() != first


def test_metadata_of_a_datasets_folder_is_kept(tmp_path: Path) -> None:
    from datasets import Dataset

    rows = [{"year": 1, "lang": None}, {"year": None, "lang": "de"}, None]
    Dataset.from_dict({"title": ["t"] * 3, "text": ["x"] * 3, "metadata": rows}).save_to_disk(
        tmp_path / "set"
    )
    records = list(CorpusReader(tmp_path / "set"))
    assert [record.metadata for record in records] == ['{"year": 1}', '{"lang": "de"}', None]
