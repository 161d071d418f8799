"""Settings of a service from flags, environment and file; the only module that reads the environment."""

import argparse
import difflib
import json
import os
import sys
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, NoReturn, TypeVar, Union, get_args, get_origin

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

SettingsT = TypeVar("SettingsT", bound=BaseModel)


class ServiceSettings(BaseModel):
    """What every service of the pair can be told."""

    model_config = ConfigDict(frozen=True, extra="forbid", validate_default=True)

    grpc_host: str = Field("127.0.0.1", description="address that the gRPC port listens on")
    grpc_port: int = Field(0, ge=0, le=65535, description="gRPC port; 0 takes a free one")
    http_host: str = Field("127.0.0.1", description="address that the HTTP side port listens on")
    http_port: int = Field(
        0, ge=0, le=65535, description="HTTP port of /livez, /readyz and /metrics; 0 takes a free one"
    )
    log_level: Literal["debug", "info", "warning", "error"] = Field("info", description="least level logged")
    log_format: Literal["text", "json"] = Field("text", description="one line of text or of JSON a record")
    max_message_bytes: int = Field(
        64 * 2**20, ge=4096, le=2**31 - 1, description="largest gRPC message received or sent"
    )
    max_concurrent_rpcs: int = Field(1024, ge=1, description="RPCs at once before RESOURCE_EXHAUSTED")
    max_rpc_timeout_s: float = Field(
        600.0, gt=0, description="seconds that an RPC may take, whatever its own deadline says"
    )
    max_connection_age_s: float = Field(
        0.0, ge=0, description="seconds until a client must reconnect and so find new replicas; 0 never"
    )
    keepalive_time_s: float = Field(30.0, ge=10, description="seconds between pings of an idle connection")
    keepalive_timeout_s: float = Field(10.0, gt=0, description="seconds until an unanswered ping closes it")
    shutdown_delay_s: float = Field(
        0.0, ge=0, description="seconds between NOT_SERVING and refusing RPCs, for load balancers to notice"
    )
    drain_timeout_s: float = Field(30.0, ge=0, description="seconds that running RPCs get to finish in")


def load_settings(
    cls: type[SettingsT],
    *,
    env_prefix: str,
    argv: Sequence[str] | None = None,
    environ: Mapping[str, str] | None = None,
    program: str | None = None,
) -> SettingsT:
    """Returns the settings; a flag wins over the environment, that over the file, that over the default.

    A field `grpc_port` is the flag --grpc-port, the variable {env_prefix}GRPC_PORT and the key grpc_port of
    the YAML or TOML file that --config or {env_prefix}CONFIG names. An empty variable counts as not set.
    Lists are written as JSON or with commas. Prints a message and exits with status 2 on an unknown name or
    a wrong value, with status 0 after --help. `argv` and `environ` default to those of the process.
    """
    environ = os.environ if environ is None else environ
    parser = _parser(cls, env_prefix, program)
    flags = vars(parser.parse_args(argv))
    config = flags.pop("config") or environ.get(f"{env_prefix}CONFIG")
    found: dict[str, tuple[Any, str]] = {}
    try:
        if config:
            found.update(_from_file(cls, Path(config)))
        found.update(_from_environment(cls, env_prefix, environ))
        found.update({name: (text, flag_name(name)) for name, text in flags.items() if text is not None})
        values = {name: _parsed(cls.model_fields[name], raw) for name, (raw, _) in found.items()}
        return cls.model_validate(values)
    except ValidationError as error:
        _fail(parser, [_explained(problem, found) for problem in error.errors()])
    except ValueError as error:
        _fail(parser, [str(error)])


def flag_name(field: str) -> str:
    """The flag that sets a field: grpc_port -> --grpc-port."""
    return f"--{field.replace('_', '-')}"


def environment_name(env_prefix: str, field: str) -> str:
    """The variable that sets a field: grpc_port -> RAG_RETRIEVER_GRPC_PORT."""
    return f"{env_prefix}{field.upper()}"


def _parser(cls: type[BaseModel], env_prefix: str, program: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=program,
        description=(cls.__doc__ or "").strip(),
        epilog="A flag wins over its environment variable, that over the file, that over the default.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--config", metavar="FILE", help=f"YAML or TOML file of settings (env {env_prefix}CONFIG)"
    )
    for name, field in cls.model_fields.items():
        is_bool = field.annotation is bool
        default = "required" if field.is_required() else f"default {_shown(field.get_default())}"
        text = f"{field.description or name} (env {environment_name(env_prefix, name)}, {default})"
        parser.add_argument(
            flag_name(name),
            dest=name,
            metavar=_metavar(field.annotation),
            help=text.replace("%", "%%"),
            nargs="?" if is_bool else None,
            const="true" if is_bool else None,
        )
    return parser


def _metavar(annotation: Any) -> str:
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin in {Union, UnionType}:
        return "|".join(_metavar(one) for one in arguments if one is not NoneType)
    if origin is Literal:
        return "{" + ",".join(str(choice) for choice in arguments) + "}"
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return "{" + ",".join(str(choice.value) for choice in annotation) + "}"
    if origin in {tuple, list, set, frozenset}:
        return f"{_metavar(arguments[0])},…"
    return str(getattr(origin or annotation, "__name__", annotation)).upper()


def _shown(default: object) -> str:
    if default is None or default is PydanticUndefined:
        return "none"
    return repr(default) if default == "" else str(default)


def _from_file(cls: type[BaseModel], path: Path) -> dict[str, tuple[Any, str]]:
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise ValueError(f"--config: cannot read {path}: {error.strerror}") from error
    try:
        loaded = tomllib.loads(text) if path.suffix == ".toml" else yaml.safe_load(text)
    except (tomllib.TOMLDecodeError, yaml.YAMLError) as error:
        raise ValueError(f"--config: {path} is not valid: {error}") from error
    if loaded is None:
        return {}
    if not isinstance(loaded, dict):
        raise ValueError(f"--config: {path} must hold names and values, not a {type(loaded).__name__}")
    for key in loaded:
        if key not in cls.model_fields:
            raise _unknown(f"key in {path}", str(key), cls.model_fields)
    return {str(key): (value, str(path)) for key, value in loaded.items()}


def _from_environment(
    cls: type[BaseModel], env_prefix: str, environ: Mapping[str, str]
) -> dict[str, tuple[Any, str]]:
    fields = {field.upper(): field for field in cls.model_fields}
    found = {}
    for variable, text in environ.items():
        if not variable.startswith(env_prefix) or variable == f"{env_prefix}CONFIG":
            continue
        name = variable.removeprefix(env_prefix)
        if name not in fields:
            raise _unknown("environment variable", name, fields, env_prefix)
        if text != "":
            found[fields[name]] = (text, variable)
    return found


def _unknown(what: str, name: str, known: Iterable[str], prefix: str = "") -> ValueError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    hint = f"; did you mean {prefix}{near[0]}?" if near else ""
    return ValueError(f"unknown {what}: {prefix}{name}{hint}")


def _parsed(field: FieldInfo, raw: object) -> object:
    """Splits the text of a list and reads the JSON of a mapping; pydantic reads every other text itself."""
    origin = get_origin(field.annotation)
    if not isinstance(raw, str) or origin not in {tuple, list, set, frozenset, dict}:
        return raw
    if raw.lstrip().startswith(("[", "{")):
        return json.loads(raw)
    return [part.strip() for part in raw.split(",") if part.strip()]


def _explained(problem: Any, found: Mapping[str, tuple[Any, str]]) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    if problem["type"] == "missing":
        return f"{flag_name(name)} is required"
    value, origin = found.get(name, (problem["input"], "default"))
    source = "" if origin == flag_name(name) else f" (from {origin})"
    return f"{flag_name(name)}: {message[:1].lower()}{message[1:]}, got {value!r}{source}"


def _fail(parser: argparse.ArgumentParser, messages: Sequence[str]) -> NoReturn:
    for message in messages:
        sys.stderr.write(f"{parser.prog}: error: {message}\n")
    sys.stderr.write(f"{parser.prog}: try --help\n")
    sys.exit(2)
