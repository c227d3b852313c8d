"""What a peer can be told, from weakest to strongest: a TOML file, environment variables, the command line."""

from __future__ import annotations

import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeVar

from pydantic import ByteSize, Field, ValidationError, field_validator
from pydantic_settings import (
    BaseSettings,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    TomlConfigSettingsSource,
)

from swarm.errors import UsageError
from swarm.files.hub import DEFAULT_MODEL
from swarm.types import Address, Span
from swarm.wire import Rounding

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

_PREFIX = "SHOAL_"  # of environment variables
_EXTRA = "extra_forbidden"  # pydantic's name of the mistake


class PeerSettings(BaseSettings):
    """Of every peer."""

    model_config = SettingsConfigDict(extra="forbid", env_prefix=_PREFIX, env_ignore_empty=True, frozen=True)

    initial_peers: Annotated[list[str], NoDecode] = []
    listen: str = "127.0.0.1:0"
    announce: str | None = None
    identity: Path | None = None

    @field_validator("initial_peers", mode="before")
    @classmethod
    def _split(cls, value: Any) -> Any:
        """A string holds several addresses with commas or spaces between."""
        return value.replace(",", " ").split() if isinstance(value, str) else value

    @field_validator("listen", "announce")
    @classmethod
    def _is_address(cls, value: str | None) -> str | None:
        if value is not None:
            parse_address(value)
        return value

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Command line, environment, file: the first that names a value wins."""
        return init_settings, env_settings, TomlConfigSettingsSource(settings_cls)


class BootstrapSettings(PeerSettings):
    """Of `peer bootstrap`."""


class ServeSettings(PeerSettings):
    """Of `peer serve`."""

    model: str = DEFAULT_MODEL
    blocks: str | None = None
    num_blocks: Annotated[int, Field(ge=1)] | None = None
    memory: Annotated[ByteSize, Field(ge=1)] | None = None
    look_seconds: Annotated[float, Field(ge=0.0, le=86_400.0)] = 600.0
    stay_seconds: Annotated[float, Field(ge=0.0, le=30 * 86_400.0)] = 3600.0
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    wire_dtype: Rounding = "auto"
    quantize: Literal["none", "int8", "int4"] = "none"
    cache_tokens: Annotated[int, Field(ge=1, le=1 << 40)] | None = None
    cache_dtype: Literal["float32", "bfloat16", "float16"] | None = None
    lease_seconds: Annotated[float, Field(ge=1.0, le=3600.0)] = 30.0
    drain_timeout: Annotated[float, Field(ge=0.0, le=3600.0)] = 30.0
    threads: Annotated[int, Field(ge=1)] | None = None
    nice: Annotated[int, Field(ge=0, le=19)] = 10

    @field_validator("blocks")
    @classmethod
    def _is_span(cls, value: str | None) -> str | None:
        if value is not None:
            parse_span(value)
        return value


class TrainSettings(PeerSettings):
    """Of `peer train`."""

    stage: Annotated[int, Field(ge=0)] | None = None
    checkpoints: Path | None = None
    resume: bool = False
    leave: bool = False
    device: Literal["cpu", "cuda", "mps"] = "cpu"
    lease_seconds: Annotated[float, Field(ge=1.0, le=3600.0)] = 30.0
    threads: Annotated[int, Field(ge=1)] | None = None
    nice: Annotated[int, Field(ge=0, le=19)] = 10

    @field_validator("checkpoints")
    @classmethod
    def _is_folder(cls, value: Path | None) -> Path | None:
        if value is not None and value.exists() and not value.is_dir():
            raise ValueError(f"{value} is no folder")
        return value


_Kind = TypeVar("_Kind", bound=PeerSettings)


def load(kind: type[_Kind], file: Path | None, given: dict[str, Any]) -> _Kind:
    """Settings of `kind` from `file`, the environment (`SHOAL_...`) and what was `given` on the command line.

    Raises `UsageError` naming the field that is wrong.
    """
    if file is not None and not file.is_file():
        raise UsageError(f"there is no configuration file {file}")
    layered: Any = type(kind.__name__, (kind,), {"model_config": {**kind.model_config, "toml_file": file}})
    given = {name: value for name, value in given.items() if value is not None}
    try:
        settings: _Kind = layered(**given)
        return settings
    except ValidationError as error:
        raise UsageError("; ".join(_explained(problem, kind, file, given) for problem in error.errors())) from None
    except (ValueError, OSError) as error:  # it is no TOML, or may not be read
        raise UsageError(f"{file}: {error}") from None


def _explained(problem: ErrorDetails, kind: type[PeerSettings], file: Path | None, given: dict[str, Any]) -> str:
    """One of pydantic's complaints in our words, with the place that the value came from."""
    name = str(problem["loc"][0]) if problem["loc"] else ""
    if problem["type"] == _EXTRA:
        close = difflib.get_close_matches(name, kind.model_fields, n=1)
        hint = f"did you mean {close[0]}?" if close else f"there are {', '.join(kind.model_fields)}"
        return f"{file}: no option is called {name}; {hint}"
    variable = f"{_PREFIX}{name}".upper()
    if name in given:
        where = f"--{name.replace('_', '-')}"
    else:
        where = variable if os.environ.get(variable) else f"{file}: {name}"
    what = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "byte_size":
        what = f"{problem['input']!r} is no size; write one as in 8GB"
    elif problem["type"] != "value_error":  # our own name the value
        what = f"{what[0].lower()}{what[1:]}, not {problem['input']!r}"
    return f"{where}: {what}"


def parse_span(text: str) -> Span:
    """ "4:12" as blocks 4 to 11. Raises `ValueError`."""
    start, colon, end = text.partition(":")
    if not (colon and start.isdecimal() and end.isdecimal() and int(start) < int(end)):
        raise ValueError(f"{text!r} is no range of blocks; write START:END, as in 0:10, with START < END")
    return Span(int(start), int(end))


def parse_address(text: str) -> Address:
    """ "127.0.0.1:4000" or "[::1]:4000". Raises `ValueError`."""
    host, colon, port = text.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not (host and colon and port.isdecimal() and int(port) < 65536):
        raise ValueError(f"{text!r} is no address; write HOST:PORT, as in 0.0.0.0:4000 (port 0 for any)")
    return Address(host, int(port))
