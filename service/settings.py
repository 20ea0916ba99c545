"""What can be set: by a file, by the environment, on the command line."""

import os
import re
import tomllib
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from merge_recipe import unknown_name
from model_locate import HUB_ID
from model_utils import free_memory, parse_size

PREFIX = "LLAMA_MERGE_"
"""Of environment variables: LLAMA_MERGE_PORT is the port."""

HOST_NAME = re.compile(r"[\w.-]+|[0-9A-Fa-f.]*:[0-9A-Fa-f:.]*", re.ASCII)
LOOPBACK = ("127.0.0.1", "::1", "localhost")
EVERYWHERE = ("0.0.0.0", "::")

LISTS = {"models": os.pathsep, "hub_models": ",", "hosts": ",", "trusted_proxies": ","}
"""Settings with several values, and what parts them in the environment."""


LEAST_MEMORY = 100 * 10**6
"""With less, not even the smallest merge can be begun: its program takes most of it."""


def _data_home() -> Path:
    return Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local/share") / "llama-merge"


class Settings(BaseModel):
    """How the service runs. Sizes are such as "2GB" or a number of bytes."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False
    )

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on")
    port: int = Field(5007, ge=0, le=65535, description="port to listen on; 0 for any free one")
    hosts: tuple[str, ...] = Field(
        (), description="names that clients may reach it by, beside the address; as merge.lan"
    )
    trusted_proxies: tuple[str, ...] = Field(
        (),
        description="addresses of proxies in front; what they say of clients (X-Forwarded-For, "
        "X-Forwarded-Proto) is believed",
    )
    token: str | None = Field(
        None,
        min_length=16,
        description="what clients must send as `Authorization: Bearer`; beyond loopback one is "
        "made where none is given",
    )
    data: Path = Field(
        default_factory=_data_home,
        description="folder for jobs and results; by default llama-merge in $XDG_DATA_HOME, or in "
        "~/.local/share",
    )
    models: tuple[Path, ...] = Field((), description="folders in which there are models")
    hub_models: tuple[str, ...] = Field((), description="more models of the Hub to offer, by id")
    hub_downloads: bool = Field(False, description="download models of the Hub when asked for")
    tiny_models: bool = Field(True, description="offer the tiny LLaMAs, to try things out")
    workers: int = Field(1, ge=1, le=64, description="jobs that run at once")
    threads: int | None = Field(None, ge=1, description="of a merge; by default one per core")
    device: str = Field("cpu", description="where merges are computed: cpu or cuda")
    max_memory: int | str | None = Field(
        None, description="of a job; by default three quarters of what is free at the start"
    )
    queue: int = Field(100, ge=1, description="jobs that wait or run, at most")
    disk_reserve: int | str = Field("1GB", description="room on the disk that is left free")
    keep_days: float = Field(
        30.0,
        ge=0,
        le=36_500,
        description="results, and experiments without one, are removed after so long; 0: never",
    )
    max_results: int | str | None = Field(
        None, description="of all results; the oldest are removed for a new one"
    )
    job_hours: float = Field(24.0, gt=0, description="a process that takes longer is stopped")
    max_body: int | str = Field("1MB", description="of a request")
    body_seconds: float = Field(10.0, gt=0, description="in which a request must have arrived")
    header_seconds: float = Field(
        15.0, gt=0, description="in which the first line and the headers must have arrived"
    )
    stalled_seconds: float = Field(
        120.0, gt=0, description="in which a client must take something of an answer"
    )
    plan_seconds: float = Field(30.0, gt=0, description="that a plan may take")
    reads_per_second: float = Field(200.0, gt=0, description="requests of one client")
    changes_per_minute: float = Field(
        60.0, gt=0, description="requests of one client that start or remove something"
    )
    watchers: int = Field(500, ge=1, description="clients that are told of progress at once")

    @field_validator("max_memory", "disk_reserve", "max_results", "max_body")
    @classmethod
    def _size(cls, size: int | str | None, info: ValidationInfo) -> int | None:
        if info.field_name == "disk_reserve" and str(size) == "0":
            return 0
        if size is None:
            return None
        nbytes = parse_size(size, str(info.field_name))
        if info.field_name == "max_memory" and nbytes < LEAST_MEMORY:
            raise ValueError(f"max_memory must be at least {LEAST_MEMORY // 10**6}MB, got {size}")
        return nbytes

    @field_validator(*LISTS, mode="before")
    @classmethod
    def _several(cls, value: Any, info: ValidationInfo) -> Any:
        several = (value,) if isinstance(value, str | Path) else value
        if isinstance(several, list | tuple) and "" in several:
            raise ValueError(f"{info.field_name} has an entry that is empty")
        return several

    @field_validator("hosts")
    @classmethod
    def _are_names(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [each for each in hosts if not HOST_NAME.fullmatch(each)]:
            raise ValueError(f"hosts must be names such as merge.lan, without http:// and port, "
                             f"got {', '.join(map(repr, wrong))}")  # fmt: skip
        return hosts

    @field_validator("hub_models")
    @classmethod
    def _are_ids(cls, ids: tuple[str, ...]) -> tuple[str, ...]:
        if wrong := [each for each in ids if HUB_ID.fullmatch(each) is None or "@" in each]:
            raise ValueError(
                "hub_models must be ids such as org/name, without a revision, "
                f"got {', '.join(map(repr, wrong))}"
            )
        return ids

    @field_validator("models")
    @classmethod
    def _there(cls, models: tuple[Path, ...]) -> tuple[Path, ...]:
        if missing := [str(path) for path in models if not path.expanduser().is_dir()]:
            raise ValueError(f"there is no folder {', '.join(missing)}. Make it, or leave it out")
        return models

    @field_validator("data", "models")
    @classmethod
    def _absolute(cls, paths: Any) -> Any:
        if isinstance(paths, Path):
            return paths.expanduser().absolute()
        return tuple(path.expanduser().absolute() for path in paths)

    @property
    def is_local(self) -> bool:
        """Whether it is meant for this machine alone: a proxy in front has others reach it."""
        return {self.host, *self.hosts} <= {*LOOPBACK} and not self.trusted_proxies

    @property
    def memory_bytes(self) -> int | None:
        """What a job may take; None if nothing is known of this machine's memory."""
        if self.max_memory is not None:
            return int(self.max_memory)
        free = free_memory()
        return None if free is None else free * 3 // 4 // self.workers


def read_settings(
    file: Path | None = None,
    given: Mapping[str, Any] = MappingProxyType({}),
    environment: Mapping[str, str] = os.environ,
) -> Settings:
    """The settings: what is given comes before the environment, and that before the file.

    Args:
        file: TOML, with the names of `Settings`; by default what LLAMA_MERGE_CONFIG names, if
            anything.
        given: from the command line, by the names of settings; None for what is not given.
        environment: of the process.

    Raises:
        ValueError: something is wrong with them; one line each.
        OSError: the file cannot be read.
    """
    named = environment.get(f"{PREFIX}CONFIG")
    path = file or (Path(named) if named else None)
    values: dict[str, Any] = {}
    origin: dict[str, str] = {}
    if path is not None:
        try:
            values = tomllib.loads(path.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path}: is not TOML: {error}") from None
        origin = dict.fromkeys(values, str(path))
    names = {f"{PREFIX}{key.upper()}": key for key in Settings.model_fields}
    ours = {f"{PREFIX}CONFIG", *names}
    strange = sorted(name for name in environment if name.startswith(PREFIX) and name not in ours)
    if strange:
        texts = (unknown_name("environment variable", each, sorted(ours)) for each in strange)
        raise ValueError("\n".join(texts))
    for name, key in names.items():
        if environment.get(name):
            text = environment[name]
            values[key] = _listed(text, LISTS[key]) if key in LISTS else text
            origin[key] = name
    for key, value in given.items():
        if value is not None:
            values[key], origin[key] = value, f"--{key.replace('_', '-')}"
    try:
        return Settings(**values)
    except ValidationError as error:
        raise ValueError("\n".join(_problem(each, origin) for each in error.errors())) from None


def _listed(text: str, separator: str) -> list[str]:
    """The entries of a variable; one may end with a separator, and there may be spaces."""
    return [each for part in text.split(separator) if (each := part.strip())]


def _problem(error: Any, origin: Mapping[str, str]) -> str:
    key = str(error["loc"][0])
    where = origin.get(key, "settings")
    if error["type"] == "extra_forbidden":
        return f"{where}: {unknown_name('setting', key, Settings.model_fields)}"
    shown = "***" if key == "token" else repr(error["input"])
    text = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":  # ours, which says of what it is and what was given
        return f"{where}: {text}"
    return f"{where}: {key}: {text[0].lower()}{text[1:]}, got {shown}"
