"""Settings of the demo's commands, and what is made again when."""

from pathlib import Path

import pytest
from rich.console import Console

from demo import build_index
from demo.build_index import DemoError
from demo.settings import DemoSettings, EvaluateSettings, RunSettings, demo_settings


def test_short_names_of_make_are_settings() -> None:
    run = demo_settings(RunSettings, "demo.run", [], {"ONCE": "1", "QUICK": "1"})
    assert run.once
    evaluate = demo_settings(
        EvaluateSettings, "demo.evaluate", [], {"ONCE": "1", "QUICK": "1", "JSON": "out.json"}
    )
    assert evaluate.quick
    assert evaluate.json_file == "out.json"


def test_an_empty_short_name_is_not_set() -> None:
    assert not demo_settings(RunSettings, "demo.run", [], {"ONCE": ""}).once


def test_one_environment_serves_every_command() -> None:
    given = {
        "RAG_DEMO_GENERATOR_GRPC_PORT": "50152",
        "RAG_DEMO_NUM_BEAMS": "2",
        "RAG_DEMO_FOLDER": "elsewhere",
    }
    run = demo_settings(RunSettings, "demo.run", [], given)
    assert run.generator_grpc_port == 50152
    assert run.checkpoint == Path("elsewhere/checkpoint")
    assert demo_settings(EvaluateSettings, "demo.evaluate", [], given).num_beams == 2
    assert demo_settings(DemoSettings, "demo.build_index", [], given).index == Path("elsewhere/index")


def test_a_misspelt_variable_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        demo_settings(RunSettings, "demo.run", [], {"RAG_DEMO_QUESTIN": "?"})
    assert "RAG_DEMO_QUESTION" in capsys.readouterr().err


@pytest.fixture
def made(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of what was made, by stand-ins for the slow parts."""
    names: list[str] = []

    def assemble(command: list[str], *, shown: bool = False) -> None:
        names.append("checkpoint")
        Path(command[-1]).mkdir(parents=True, exist_ok=True)

    def index(corpus: Path, output: Path, *, shown: bool = False) -> None:
        names.append("index")
        output.mkdir(parents=True, exist_ok=True)

    monkeypatch.setattr(build_index, "_run", assemble)
    monkeypatch.setattr(build_index, "build_index", index)
    return names


def test_only_what_is_stale_is_made_again(tmp_path: Path, made: list[str]) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("{}\n")
    settings = DemoSettings(folder=tmp_path / "demo", corpus=corpus)
    console = Console(quiet=True)
    build_index.prepare(settings, console)
    assert made == ["checkpoint", "index"]
    build_index.prepare(settings, console)
    assert made == ["checkpoint", "index"]
    corpus.write_text("{}\n{}\n")
    build_index.prepare(settings, console)
    assert made == ["checkpoint", "index", "index"]


def test_what_failed_halfway_is_made_again(
    tmp_path: Path, made: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text("{}\n")
    settings = DemoSettings(folder=tmp_path / "demo", corpus=corpus)
    stand_in = build_index.build_index

    def fails(corpus: Path, output: Path, *, shown: bool = False) -> None:
        output.mkdir(parents=True)
        raise DemoError("disk full")

    monkeypatch.setattr(build_index, "build_index", fails)
    with pytest.raises(DemoError, match="disk full"):
        build_index.prepare(settings, Console(quiet=True))
    monkeypatch.setattr(build_index, "build_index", stand_in)
    build_index.prepare(settings, Console(quiet=True))
    assert made == ["checkpoint", "index"]


def test_a_missing_corpus_is_named(tmp_path: Path, made: list[str]) -> None:
    settings = DemoSettings(folder=tmp_path, corpus=tmp_path / "none.jsonl")
    with pytest.raises(DemoError, match=r"none\.jsonl"):
        build_index.prepare(settings, Console(quiet=True))


def test_a_command_that_fails_shows_the_end_of_what_it_said() -> None:
    with pytest.raises(DemoError, match="ended with status 3\nlast words"):
        build_index._run(["/bin/sh", "-c", "echo last words; exit 3"])
