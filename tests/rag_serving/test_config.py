"""Settings: precedence, names, help, and errors that name the flag, the value and where it came from."""

import subprocess
import sys
from enum import Enum
from pathlib import Path
from typing import Any, Literal

import pytest
from pydantic import Field, ValidationError, model_validator

from rag_serving.config import ServiceSettings, environment_name, flag_name, load_settings


class Pooling(Enum):
    FIRST_OUTPUT = "first_output"
    MEAN = "mean"


class Settings(ServiceSettings):
    """Settings of a test service."""

    n_docs: int = Field(5, ge=1, description="documents for each question, 100% of them found")
    metric: Literal["inner_product", "l2"] = "inner_product"
    do_deduplication: bool = Field(False, description="drop equal sequences")
    index_path: Path = Field(Path("var/index"), description="folder of the index")
    bad_words: tuple[str, ...] = Field((), description="words never generated")
    prefix: str | None = Field(None, description="put before each context")
    pooling: Pooling | None = Field(None, description="how vectors pool")
    limit: float | None = Field(None, description="optional number")

    @model_validator(mode="after")
    def _fits(self) -> "Settings":
        if self.grpc_port and self.grpc_port == self.http_port:
            raise ValueError("grpc_port and http_port must differ")
        return self


def load(argv: list[str] | None = None, **environ: str) -> Settings:
    return load_settings(Settings, env_prefix="RAG_X_", argv=argv or [], environ=environ, program="rag-x")


def refusal(capsys: pytest.CaptureFixture[str], argv: list[str] | None = None, **environ: str) -> str:
    with pytest.raises(SystemExit) as caught:
        load(argv, **environ)
    assert caught.value.code == 2
    return capsys.readouterr().err


def test_defaults_hold_when_nothing_is_said() -> None:
    assert load() == Settings()
    assert load().n_docs == 5


@pytest.mark.parametrize("suffix", ["yaml", "toml"])
def test_flag_wins_over_environment_over_file_over_default(tmp_path: Path, suffix: str) -> None:
    text = {"yaml": "n_docs: 2\ndrain_timeout_s: 3\nlog_level: error\n"}.get(
        suffix, 'n_docs = 2\ndrain_timeout_s = 3\nlog_level = "error"\n'
    )
    path = tmp_path / f"settings.{suffix}"
    path.write_text(text)
    settings = load(["--config", str(path), "--n-docs", "9"], RAG_X_N_DOCS="7", RAG_X_LOG_LEVEL="debug")
    assert (settings.n_docs, settings.log_level, settings.drain_timeout_s) == (9, "debug", 3.0)
    assert settings.grpc_host == "127.0.0.1"


def test_the_file_may_be_named_by_the_environment(tmp_path: Path) -> None:
    path = tmp_path / "settings.yml"
    path.write_text("bad_words: [a, b]\n")
    assert load(RAG_X_CONFIG=str(path)).bad_words == ("a", "b")


@pytest.mark.parametrize(
    ("text", "parsed"), [("one,two", ("one", "two")), ('["a,b", "c"]', ("a,b", "c")), (" one ", ("one",))]
)
def test_lists_are_written_with_commas_or_as_json(text: str, parsed: tuple[str, ...]) -> None:
    assert load(["--bad-words", text]).bad_words == parsed
    assert load(RAG_X_BAD_WORDS=text).bad_words == parsed


def test_a_list_flag_may_be_said_again() -> None:
    assert load(["--bad-words", "one,true", "--bad-words", "007"]).bad_words == ("one", "true", "007")


def test_a_bool_flag_alone_means_true() -> None:
    assert load(["--do-deduplication"]).do_deduplication is True
    assert load(["--do-deduplication", "false"], RAG_X_DO_DEDUPLICATION="true").do_deduplication is False


def test_an_empty_variable_counts_as_not_set_and_an_empty_flag_as_empty() -> None:
    assert load(RAG_X_N_DOCS="", RAG_X_PREFIX="").prefix is None
    assert load(["--prefix", ""]).prefix == ""


def test_none_says_none_where_a_setting_may_be_none(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("prefix: from the file\npooling: mean\n")
    assert load(["--config", str(path)]).pooling is Pooling.MEAN
    assert load(["--config", str(path), "--prefix", "none"], RAG_X_POOLING="none") == Settings()
    for settings in (
        load(["--bad-words", "none", "--grpc-host", "none"]),
        load(RAG_X_BAD_WORDS="none", RAG_X_GRPC_HOST="none"),
    ):
        assert (settings.bad_words, settings.grpc_host) == (("none",), "none")


def test_unknown_names_are_told_alone(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("n_docz = 1\nn_docs = 0\n")
    told = refusal(capsys, ["--config", str(path)], RAG_X_GRPC_PRT="1", RAG_X_n_docs="1").splitlines()
    assert told == [
        f"rag-x: error: unknown key in {path}: n_docz; did you mean n_docs?",
        "rag-x: error: unknown environment variable: RAG_X_GRPC_PRT; did you mean RAG_X_GRPC_PORT?",
        "rag-x: error: unknown environment variable: RAG_X_n_docs; did you mean RAG_X_N_DOCS?",
        "rag-x: try --help",
    ]


def test_settings_made_directly_read_neither_flags_nor_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("N_DOCS", "9")
    monkeypatch.setattr(sys, "argv", ["rag-x", "--n-docs", "8"])
    assert Settings().n_docs == 5
    assert Settings.model_validate({"n_docs": 7}).n_docs == 7
    assert type(load()) is Settings


def test_settings_cannot_be_changed_and_have_no_unknown_fields() -> None:
    with pytest.raises(ValidationError):
        load().n_docs = 3  # type: ignore[misc]
    with pytest.raises(ValidationError):
        Settings(nonsense=1)  # type: ignore[call-arg]


@pytest.mark.parametrize(
    ("argv", "environ", "words"),
    [
        (["--n-doc", "3"], {}, "unrecognized arguments: --n-doc 3; did you mean --n-docs?"),
        (["--nonsense", "3"], {}, "unrecognized arguments: --nonsense 3\n"),
        (["--n-docs", "many"], {}, "--n-docs: input should be a valid integer"),
        (["--n-docs", "0"], {}, "greater than or equal to 1, got '0'"),
        (["--metric", "cosine"], {}, "'inner_product' or 'l2'"),
        ([], {"RAG_X_N_DOCS": "many"}, "got 'many' (from RAG_X_N_DOCS)"),
        ([], {"RAG_X_N_DOC": "3"}, "unknown environment variable: RAG_X_N_DOC; did you mean RAG_X_N_DOCS?"),
        ([], {"RAG_X_NONSENSE": "3"}, "unknown environment variable: RAG_X_NONSENSE\n"),
        (["--grpc-port", "70000"], {}, "--grpc-port: input should be less than or equal to 65535"),
        (["--grpc-port", "80", "--http-port", "80"], {}, "grpc_port and http_port must differ"),
        (["--bad-words", "[1,"], {}, "--bad-words: input should be a valid tuple, got '[1,'"),
        ([], {"RAG_X_BAD_WORDS": "[1,"}, "got '[1,' (from RAG_X_BAD_WORDS)"),
        (["--pooling", "none at all"], {}, "--pooling: input should be 'first_output' or 'mean'"),
        (["--config", "/no/such.yaml"], {}, "cannot read /no/such.yaml: No such file"),
        (["--config", "/"], {}, "cannot read /: No such file"),
    ],
)
def test_a_wrong_name_or_value_exits_with_status_2_and_says_which(
    capsys: pytest.CaptureFixture[str], argv: list[str], environ: dict[str, str], words: str
) -> None:
    message = refusal(capsys, argv, **environ)
    assert "rag-x: error:" in message
    assert words in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("n_docz: 1\n", "did you mean n_docs?"),
        ("- 1\n", "must hold names and values, not a list"),
        ("plain text\n", "must hold names and values, not a list or a text"),
        ("1: n_docs\n", "must hold names and values"),
        ("config: other.yaml\n", "settings.yaml: config\n"),
        ("a: [\n", "is not valid"),
        ("n_docs: none at all\n", "settings.yaml)"),
    ],
)
def test_a_wrong_file_is_refused_by_name(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, text: str, words: str
) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text(text)
    assert words in refusal(capsys, ["--config", str(path)])


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "settings.yaml"
    path.write_text("# nothing\n")
    assert load(["--config", str(path)]) == Settings()


def test_help_prints_every_flag_with_its_variable_default_and_text(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with pytest.raises(SystemExit) as caught:
        load(["--help"])
    assert caught.value.code == 0
    text = " ".join(capsys.readouterr().out.split())
    for name, field in Settings.model_fields.items():
        assert flag_name(name) in text
        assert environment_name("RAG_X_", name) in text
        assert (field.description or "") in text
    assert "(default: 5)" in text
    assert "--n-docs int " in text
    assert "--limit float " in text
    assert "--bad-words A,B,… " in text
    assert "--metric {inner_product,l2} " in text
    assert "--pooling {first_output,mean} " in text
    assert "--do-deduplication [bool] " in text
    assert "--config " in text
    assert "RAG_X_CONFIG" in text


def test_a_required_setting_that_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    class Strict(ServiceSettings):
        checkpoint: str = Field(description="folder of the checkpoint")

    with pytest.raises(SystemExit) as caught:
        load_settings(Strict, env_prefix="RAG_X_", argv=[], environ={})
    assert caught.value.code == 2
    assert "--checkpoint is required" in capsys.readouterr().err


def test_every_common_setting_has_a_description() -> None:
    fields: dict[str, Any] = ServiceSettings.model_fields
    assert [name for name, field in fields.items() if not field.description] == []


def test_the_environment_is_read_when_settings_load_and_not_at_import() -> None:
    program = (
        "import os, rag_serving.config as c; os.environ['RAG_X_GRPC_PORT'] = '7';"
        "print(c.load_settings(c.ServiceSettings, env_prefix='RAG_X_', argv=[]).grpc_port)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "7"
