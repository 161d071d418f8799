"""Reads a corpus as a stream of records: JSONL, TSV (psgs_w100), datasets folders, Markdown and text."""

import csv
import enum
import gzip
import hashlib
import io
import itertools
import json
import os
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from retriever_service.errors import BuildError
from retriever_service.ingest.pages import MARKDOWN_SUFFIXES, TEXT_SUFFIXES, page_files, read_pages
from retriever_service.ingest.passages import DEFAULT_WORDS, split_record
from retriever_service.ingest.records import MAX_TEXT_BYTES, Record, checked_record

_JSON_FIELDS = frozenset({"key", "title", "text", "metadata", "embedding"})
_DATASET_ROWS = 1000


class CorpusFormat(enum.StrEnum):
    """How a corpus is written."""

    JSONL = "jsonl"
    TSV = "tsv"
    DATASETS = "datasets"
    PAGES = "pages"


class CorpusReader:
    """A corpus that can be read again and again, each time from its beginning, holding little in memory.

    JSONL: one object a line, {"key"?, "title"?, "text", "metadata"?, "embedding"?}; other names are refused.
    TSV: id<TAB>text<TAB>title with a header and csv quoting, as psgs_w100.tsv. Datasets: what `save_to_disk`
    wrote, with columns title, text, embeddings (RagRetriever's "custom" layout; embeddings may be missing)
    and perhaps id and metadata. JSONL and TSV may be gzip files. Pages: a folder of Markdown and text files.

    With `passage_words` each record is cut into passages of at most so many words; pages always are.
    """

    def __init__(
        self,
        path: Path,
        corpus_format: CorpusFormat | None = None,
        max_text_bytes: int = MAX_TEXT_BYTES,
        *,
        passage_words: int | None = None,
        language: str = "en",
    ) -> None:
        """Raises BuildError where there is no such corpus or its format cannot be told from its name."""
        if not path.exists():
            raise BuildError(f"no corpus at {path}")
        self.path = path
        self.format = corpus_format or _format_of(path)
        self._max_text_bytes = max_text_bytes
        default_words = DEFAULT_WORDS if self.format is CorpusFormat.PAGES else None
        self._passage_words = passage_words or default_words
        self._language = language
        self._share_read = 0.0

    def __iter__(self) -> Iterator[Record]:
        """Yields the records in order. Raises BuildError naming the line or row of a bad one."""
        read = {
            CorpusFormat.JSONL: self._read_jsonl,
            CorpusFormat.TSV: self._read_tsv,
            CorpusFormat.DATASETS: self._read_datasets,
            CorpusFormat.PAGES: self._read_pages,
        }[self.format]
        self._share_read = 0.0
        for number, (fields, where) in enumerate(read()):
            if self._passage_words is None:
                yield checked_record(fields, where, self._max_text_bytes)
                continue
            named = fields if fields.get("key") is not None else fields | {"key": number}
            record = checked_record(named, where, sys.maxsize)
            yield from split_record(record, self._passage_words, self._language, self._max_text_bytes)
        self._share_read = 1.0

    def count(self) -> int | None:
        """Returns the number of records where that is cheap to know, for a progress bar."""
        if self.format is not CorpusFormat.DATASETS or self._passage_words is not None:
            return None
        return len(self._dataset())

    def estimated_count(self, num_read: int) -> int | None:
        """Returns about how many records there are, where so many came of what the last reading has read.

        That is the share of the file's bytes, or of the files or rows; None as long as nothing is read.
        """
        return round(num_read / self._share_read) if self._share_read else None

    def nth(self, position: int) -> Record:
        """Returns record `position`, counted from 0, by reading up to it."""
        return next(itertools.islice(iter(self), position, None))

    def fingerprint(self) -> str:
        """Returns a digest of how the corpus is read and of names, sizes and times of its files.

        While it stays the same, so do the records.
        """
        digest = hashlib.sha256()
        settings = (self.format, self._passage_words, self._language, self._max_text_bytes)
        digest.update(repr(settings).encode())
        for file in self._files():
            found = file.stat()
            digest.update(b"\0" + os.fsencode(file.absolute()))  # a name need not be UTF-8
            digest.update(f"\0{found.st_size}\0{found.st_mtime_ns}".encode())
        return digest.hexdigest()

    def _files(self) -> list[Path]:
        if self.format is CorpusFormat.PAGES:
            return page_files(self.path)
        if self.path.is_dir():
            return sorted(file for file in self.path.iterdir() if file.is_file())
        return [self.path]

    def _read_jsonl(self) -> Iterator[tuple[dict[str, Any], str]]:
        for number, line in enumerate(self._lines(), start=1):
            where = f"{self.path}, line {number}"
            if not line.strip():
                continue
            try:
                fields = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise BuildError(f"{where}: not JSON: {error}") from error
            if not isinstance(fields, dict):
                raise BuildError(f"{where}: must be a JSON object, got {type(fields).__name__}")
            unknown = sorted(set(fields) - _JSON_FIELDS)
            if unknown:
                raise BuildError(f"{where}: unknown field {unknown[0]!r}; known: {sorted(_JSON_FIELDS)}")
            yield fields, where

    def _read_tsv(self) -> Iterator[tuple[dict[str, Any], str]]:
        csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
        rows = csv.reader(self._lines(), delimiter="\t", strict=True)
        while True:
            where = f"{self.path}, line {rows.line_num + 1}"
            try:
                columns = next(rows, None)
            except csv.Error as error:
                raise BuildError(f"{where}: {error}") from error
            if columns is None:
                return
            if where.endswith("line 1"):
                if columns != ["id", "text", "title"]:
                    raise BuildError(f"{where}: the header must be id, text, title, got {columns}")
            elif len(columns) == 3:
                yield dict(zip(("key", "text", "title"), columns, strict=True)), where
            elif columns:
                raise BuildError(f"{where}: must have 3 columns, got {len(columns)}")

    def _read_datasets(self) -> Iterator[tuple[dict[str, Any], str]]:
        dataset = self._dataset()
        names = set(dataset.column_names)
        if not {"title", "text"} <= names:
            raise BuildError(f"{self.path}: must have columns title and text, got {sorted(names)}")
        if "embeddings" in names:
            dataset = dataset.with_format(
                "numpy", columns=["embeddings"], output_all_columns=True, dtype="float32"
            )
        columns = {
            "title": "title",
            "text": "text",
            "embedding": "embeddings",
            "key": "id",
            "metadata": "metadata",
        }
        row = 0
        for rows in dataset.iter(batch_size=_DATASET_ROWS):
            for position in range(len(rows["text"])):
                fields = {ours: rows[theirs][position] for ours, theirs in columns.items() if theirs in names}
                if isinstance(fields.get("metadata"), dict):
                    # Arrow gives every row every field of the column, None where the row had it not.
                    given = fields["metadata"]
                    fields["metadata"] = {name: value for name, value in given.items() if value is not None}
                yield fields, f"{self.path}, row {row}"
                row += 1
                self._share_read = row / len(dataset)

    def _read_pages(self) -> Iterator[tuple[dict[str, Any], str]]:
        files = page_files(self.path)
        if not files:
            raise BuildError(f"{self.path}: neither a datasets folder nor one with .md or .txt files")
        yield from read_pages(self.path, self._counted(files))

    def _counted(self, files: list[Path]) -> Iterator[Path]:
        for num_read, file in enumerate(files):
            self._share_read = num_read / len(files)
            yield file

    def _dataset(self) -> Any:
        # Imported here: reading the other formats must not cost the second that datasets takes to import.
        from datasets import Dataset, load_from_disk  # noqa: PLC0415

        try:
            dataset = load_from_disk(str(self.path))
        except (OSError, ValueError) as error:
            raise BuildError(f"{self.path} is not a datasets folder: {error}") from error
        except (LookupError, TypeError, AttributeError) as error:  # what datasets makes of an unexpected file
            raise BuildError(
                f"{self.path}: no rows, or a state.json or dataset_info.json that is damaged: {error!r}"
            ) from error
        if not isinstance(dataset, Dataset):
            raise BuildError(f"{self.path} holds several splits; give the folder of one: {sorted(dataset)}")
        return dataset

    def _lines(self) -> Iterator[str]:
        with self.path.open("rb") as file:
            size_bytes = os.fstat(file.fileno()).st_size
            packed = gzip.GzipFile(fileobj=file) if self.path.suffix == ".gz" else file
            try:
                # What is no UTF-8 comes as surrogates, so that its line can be named.
                with io.TextIOWrapper(packed, "utf-8-sig", errors="surrogateescape", newline="") as stream:
                    for number, line in enumerate(stream, start=1):
                        self._check_utf8(line, number)
                        self._share_read = file.tell() / size_bytes
                        yield line
            except (OSError, EOFError, zlib.error) as error:
                raise BuildError(f"{self.path}: cannot be read: {error}") from error

    def _check_utf8(self, line: str, number: int) -> None:
        if line.isascii():
            return
        try:
            line.encode()
        except UnicodeEncodeError as error:
            byte = ord(line[error.start]) - 0xDC00
            raise BuildError(f"{self.path}, line {number}: is not UTF-8: byte 0x{byte:02x}") from error


def _format_of(path: Path) -> CorpusFormat:
    if path.is_dir():
        saved = (path / "state.json").exists() or (path / "dataset_dict.json").exists()
        return CorpusFormat.DATASETS if saved else CorpusFormat.PAGES
    suffix = Path(path.name.removesuffix(".gz")).suffix.lower()
    if path.suffix.lower() in MARKDOWN_SUFFIXES | TEXT_SUFFIXES:
        return CorpusFormat.PAGES
    known = {".jsonl": CorpusFormat.JSONL, ".tsv": CorpusFormat.TSV}
    if suffix not in known:
        raise BuildError(f"cannot tell the format of {path}: say --format {', '.join(CorpusFormat)}")
    return known[suffix]
