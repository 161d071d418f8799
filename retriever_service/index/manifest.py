"""manifest.json: what a generation of an index is, with the checksums of its files."""

import hashlib
import json
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from retriever_service.errors import DamagedIndexError
from retriever_service.types import Metric

MANIFEST_FILE = "manifest.json"
_DIGEST_FIELD = "manifest_sha256"


class FileEntry(BaseModel):
    """Size and checksum of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    size_bytes: int = Field(ge=0)
    sha256: str = Field(pattern="^[0-9a-f]{64}$")


class Embedding(BaseModel):
    """How the vectors were made.

    `name` is what a generator compares with; `digest` is the sha256 of the passage encoder's weights; the
    rest is None where the corpus brought its embeddings along.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    name: str = Field(min_length=1)
    digest: str | None = None
    pooling: str | None = None
    normalize: bool | None = None
    max_length: int | None = None
    passage_template: str | None = None

    def matches(self, expected: str) -> bool:
        """Whether `expected` names this model: by name, by digest, or by the name without its digest."""
        return expected in {self.name, self.digest, self.name.partition("@sha256:")[0]}


class Manifest(BaseModel):
    """What a generation is. Written once, in one canonical form, with a digest of itself.

    A compaction's documents lie with `base_generation`, the build that it goes back to, and in the changes up
    to `sequence`; a build has its own, and neither field.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    format_version: Literal[1] = 1
    generation: int = Field(ge=1)
    created_at: str
    created_by: str
    kind: str
    metric: Metric
    dimension: int = Field(ge=1)
    ntotal: int = Field(ge=1)
    embedding: Embedding
    files: dict[str, FileEntry]
    base_generation: int | None = None
    sequence: int = Field(0, ge=0)

    @classmethod
    def read(cls, file: Path) -> "Manifest":
        """Reads and checks a manifest: any changed byte raises DamagedIndexError naming the file."""
        try:
            content = file.read_bytes()
            fields = json.loads(content)
            if isinstance(fields, dict):
                fields.pop(_DIGEST_FIELD, None)
            manifest = cls.model_validate(fields)
        except (OSError, ValueError, RecursionError) as error:
            what = "not a manifest of this version" if isinstance(error, ValidationError) else str(error)
            raise DamagedIndexError(file, what) from error
        if manifest.rendered() != content:
            raise DamagedIndexError(file, f"{_DIGEST_FIELD} does not match the content")
        return manifest

    def write(self, file: Path) -> None:
        """Writes the manifest; making it durable is the caller's part."""
        file.write_bytes(self.rendered())

    def digest(self) -> str:
        """Returns "sha256:…" of the canonical content."""
        content = json.dumps(self._fields(), sort_keys=True, separators=(",", ":"))
        return f"sha256:{hashlib.sha256(content.encode()).hexdigest()}"

    def rendered(self) -> bytes:
        """Returns the one form that a manifest is written in."""
        fields = {**self._fields(), _DIGEST_FIELD: self.digest()}
        return (json.dumps(fields, indent=2, ensure_ascii=False) + "\n").encode()

    def _fields(self) -> dict[str, Any]:
        """A build's manifest is that of the versions that had no compaction, byte for byte."""
        absent = {"base_generation", "sequence"} if self.base_generation is None else set()
        return self.model_dump(mode="json", exclude=absent)


def sha256_of_file(file: Path) -> str:
    """Returns the hexadecimal sha256 of a file, read in pieces. Raises OSError."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
