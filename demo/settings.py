"""Settings of the demo's commands: flags, RAG_DEMO_… in the environment, or a file."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ConfigDict, Field

from rag_serving.config import load_settings

ENV_PREFIX = "RAG_DEMO_"
ROOT = Path(__file__).resolve().parent.parent
DEMO = Path(__file__).resolve().parent

SettingsT = TypeVar("SettingsT", bound="DemoSettings")
# Short names for make, as in ONCE=1 make run.
_SHORT_NAMES = {"ONCE": "once", "QUICK": "quick", "JSON": "json_file"}


class DemoSettings(BaseModel):
    """Where the demo's pair keeps its files and how its services run."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    folder: Path = Field(ROOT / "var" / "demo", description="checkpoint, index and logs go here")
    corpus: Path = Field(DEMO / "corpus.jsonl", description="passages: key, title and text on each line")
    host: str = Field("127.0.0.1", min_length=1, description="address that the services listen on")
    threads: int = Field(0, ge=0, description="CPU threads of the generator; 0 takes every core")
    start_timeout_s: float = Field(300.0, gt=0, description="seconds until both services must serve")

    @property
    def checkpoint(self) -> Path:
        """Folder of the assembled RAG checkpoint."""
        return self.folder / "checkpoint"

    @property
    def index(self) -> Path:
        """Folder of the index."""
        return self.folder / "index"

    @property
    def logs(self) -> Path:
        """Folder of the services' logs."""
        return self.folder / "logs"


class RunSettings(DemoSettings):
    """Sets up and starts the demo's pair, asks it a question, serves until Ctrl-C."""

    retriever_grpc_port: int = Field(50051, ge=0, le=65535, description="0 takes a free one")
    retriever_http_port: int = Field(8051, ge=0, le=65535, description="0 takes a free one")
    generator_grpc_port: int = Field(50052, ge=0, le=65535, description="0 takes a free one")
    generator_http_port: int = Field(8052, ge=0, le=65535, description="0 takes a free one")
    question: str = Field(
        "Which country is today's largest producer of uranium?",
        min_length=1,
        description="what is asked first",
    )
    once: bool = Field(False, description="stop after the answer (ONCE=1)")


class EvaluateSettings(DemoSettings):
    """Measures exact match, F1 and recall of the demo through a running pair."""

    questions: Path = Field(DEMO / "questions.jsonl", description="questions with their accepted answers")
    generator: str = Field("", description="gRPC address of a running generator; empty starts a pair")
    num_beams: int = Field(4, ge=1, description="beams of the search")
    n_docs: int = Field(0, ge=0, description="documents for each question; 0 takes the checkpoint's")
    batch_size: int = Field(8, ge=1, description="questions of a request")
    concurrency: int = Field(4, ge=1, description="requests at once")
    quick: bool = Field(False, description="ask a sample of 40 questions (QUICK=1)")
    report_folder: str = Field("", description="folder that calibration.md and its plots go to")
    json_file: str = Field("", description="file that the figures go to (JSON=file)")


def demo_settings(
    cls: type[SettingsT],
    program: str,
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
) -> SettingsT:
    """Returns the settings; ONCE, QUICK and JSON count as RAG_DEMO_ONCE and so on.

    RAG_DEMO_ variables of the other commands are left alone: one environment may serve them all.
    """
    environ = os.environ if environ is None else environ
    every = {name for kind in (RunSettings, EvaluateSettings) for name in kind.model_fields}
    foreign = {f"{ENV_PREFIX}{name.upper()}" for name in every - set(cls.model_fields)}
    known = {name: text for name, text in environ.items() if name not in foreign}
    for short, name in _SHORT_NAMES.items():
        if name in cls.model_fields and environ.get(short):
            known.setdefault(f"{ENV_PREFIX}{name.upper()}", environ[short])
    return load_settings(cls, env_prefix=ENV_PREFIX, argv=argv, environ=known, program=program)
