"""Settings of a service from flags, environment and file; the only module that reads the environment."""

import argparse
import difflib
import json
import os
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from enum import EnumType
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any, Literal, NoReturn, TypeVar, get_args, get_origin

import pydantic_settings
import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from pydantic.fields import FieldInfo

SettingsT = TypeVar("SettingsT", bound=BaseModel)
# Name of each value that a source holds -> the value as written there, and what the source calls it.
Found = dict[str, tuple[Any, str]]


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
    the YAML or TOML file that --config or {env_prefix}CONFIG names. An empty variable counts as not set, and
    `none` as None where a setting may be None. Lists are written as JSON or with commas. Prints a message and
    exits with status 2 on an unknown name or a wrong value, with status 0 after --help. `argv` and `environ`
    default to those of the process.
    """

    # What the sources look for. `cls` stays a plain model, which reads nothing when it is made directly.
    class Sources(cls, pydantic_settings.BaseSettings):  # type: ignore[valid-type, misc]
        model_config = pydantic_settings.SettingsConfigDict(
            env_prefix=env_prefix,
            cli_kebab_case=True,
            cli_show_env_vars=True,
            cli_hide_none_type=True,
            cli_parse_none_str="none",
            enable_decoding=False,  # the library reads a variable's list as JSON alone; _parsed also splits it
        )
        config: Path | None = Field(None, description="YAML or TOML file of settings")

    parser = argparse.ArgumentParser(
        prog=program,
        usage="%(prog)s [--FLAG VALUE ...]",
        description=(cls.__doc__ or "").strip(),
        epilog="A flag wins over its environment variable, that over the file, that over the default.",
        allow_abbrev=False,
    )
    flags = pydantic_settings.CliSettingsSource[Any](
        Sources, root_parser=parser, add_argument_method=partial(_add_flag, Sources.model_fields)
    )
    known, unknown = parser.parse_known_args(argv)
    if unknown:
        hint = _hint(unknown[0].lstrip("-").replace("-", "_"), Sources.model_fields, flag_name)
        _fail(parser, f"unrecognized arguments: {' '.join(unknown)}{hint}")
    found = _from_environment(Sources, os.environ if environ is None else environ)
    # The library takes `none` for None whatever the setting; _parsed looks whether it may be None.
    said = flags(parsed_args=known)()
    found |= {name: ("none" if text is None else text, flag_name(name)) for name, text in said.items()}
    config, _ = found.pop("config", (None, ""))
    try:
        if config:
            found = _from_file(Sources, Path(config)) | found
        values = {name: _parsed(cls.model_fields.get(name), raw) for name, (raw, _) in found.items()}
        return cls.model_validate(values)
    except ValidationError as error:
        problems = error.errors()
        # What is missing may be what a misspelt name was to say, so unknown names are told alone.
        extra = [one for one in problems if one["type"] == "extra_forbidden"]
        _fail(parser, *(_explained(one, found, cls.model_fields, env_prefix) for one in extra or problems))
    except ValueError as error:
        _fail(parser, str(error))


def flag_name(field: str) -> str:
    """The flag that sets a field: grpc_port -> --grpc-port."""
    return f"--{field.replace('_', '-')}"


def environment_name(env_prefix: str, field: str) -> str:
    """The variable that sets a field: grpc_port -> RAG_RETRIEVER_GRPC_PORT."""
    return f"{env_prefix}{field.upper()}"


def _add_flag(fields: Mapping[str, FieldInfo], parser: Any, *names: str, **options: Any) -> None:
    """Adds a flag; the library would show an enum's names and a list's type, and want a value for every bool."""
    annotation = fields[options["dest"]].annotation
    enums: list[Any] = [kind for kind in (annotation, *get_args(annotation)) if isinstance(kind, EnumType)]
    if enums:
        options["metavar"] = "{" + ",".join(str(choice.value) for choice in enums[0]) + "}"
    elif options.get("action") == "append":
        options["metavar"] = "A,B,…"
    elif options["metavar"] == "bool":
        options |= {"nargs": "?", "const": "true"}
    parser.add_argument(*names, **options)


def _from_environment(sources: type[pydantic_settings.BaseSettings], environ: Mapping[str, str]) -> Found:
    source = pydantic_settings.EnvSettingsSource(sources)
    prefix = source.env_prefix
    given = {variable: text for variable, text in environ.items() if variable.startswith(prefix)}
    # The library reads os.environ, whatever `environ` is, and passes over the variables that it does not know.
    source.env_vars = {variable.lower(): text for variable, text in given.items() if text}
    found = {name: (text, environment_name(prefix, name)) for name, text in source().items()}
    known = {environment_name(prefix, field) for field in sources.model_fields}
    return found | {variable: (text, variable) for variable, text in given.items() if variable not in known}


def _from_file(sources: type[pydantic_settings.BaseSettings], path: Path) -> Found:
    if not path.is_file():  # the library would pass over it
        raise ValueError(f"--config: cannot read {path}: No such file")
    toml, yml = pydantic_settings.TomlConfigSettingsSource, pydantic_settings.YamlConfigSettingsSource
    try:
        values = toml(sources, path)() if path.suffix == ".toml" else yml(sources, path)()
    except OSError as error:
        raise ValueError(f"--config: cannot read {path}: {error.strerror}") from error
    except (tomllib.TOMLDecodeError, yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"--config: {path} is not valid: {error}") from error
    except (AttributeError, TypeError, ValueError) as error:  # the library took for granted that it does
        raise ValueError(f"--config: {path} must hold names and values, not a list or a text") from error
    return {name: (value, str(path)) for name, value in values.items()}


def _parsed(field: FieldInfo | None, raw: object) -> object:
    """Reads `none` and the text of a list or mapping; pydantic reads every other text itself."""
    if field is None or not isinstance(raw, str):
        return raw
    if raw == "none" and NoneType in get_args(field.annotation):
        return None
    if get_origin(field.annotation) not in {tuple, list, set, frozenset, dict}:
        return raw
    if not raw.lstrip().startswith(("[", "{")):
        return [part.strip() for part in raw.split(",") if part.strip()]
    with suppress(ValueError):  # pydantic refuses what is no JSON, by the setting's name
        return json.loads(raw)
    return raw


def _explained(problem: Any, found: Found, fields: Iterable[str], env_prefix: str) -> str:
    message = str(problem["msg"]).removeprefix("Value error, ")
    if not problem["loc"]:
        return message
    name = str(problem["loc"][0])
    value, place = found.get(name, (problem["input"], "default"))
    if problem["type"] == "extra_forbidden" and name == place:
        near = _hint(name.removeprefix(env_prefix).lower(), fields, partial(environment_name, env_prefix))
        return f"unknown environment variable: {name}{near}"
    if problem["type"] == "extra_forbidden":
        return f"unknown key in {place}: {name}{_hint(name, fields, str)}"
    if problem["type"] == "missing":
        return f"{flag_name(name)} is required"
    source = "" if place == flag_name(name) else f" (from {place})"
    return f"{flag_name(name)}: {message[:1].lower()}{message[1:]}, got {value!r}{source}"


def _hint(name: str, fields: Iterable[str], spelled: Callable[[str], str]) -> str:
    near = difflib.get_close_matches(name, fields, n=1, cutoff=0.7)
    return f"; did you mean {spelled(near[0])}?" if near else ""


def _fail(parser: argparse.ArgumentParser, *messages: str) -> NoReturn:
    lines = [*(f"error: {message}" for message in messages), "try --help"]
    parser.exit(2, "".join(f"{parser.prog}: {line}\n" for line in lines))
