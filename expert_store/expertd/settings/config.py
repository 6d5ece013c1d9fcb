"""The daemon's settings: one frozen dataclass, from a TOML file, the command line, or both."""

import math
import tomllib
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from expertd.log import LogFormat
from expertd.settings.disk_io import DiskIo, parse_disk_io
from expertd.settings.limits import ModelConfig
from expertd.settings.loopback import LoopbackAddress, parse_loopback
from expertd.settings.policy_names import DEFAULT_POLICY, PolicyName
from expertd.settings.tcp_config import TcpConfig
from expertd.settings.users import uid_of
from expertstore.errors import ConfigError
from expertstore.pack.place import named_pack
from expertstore.sizes import parse_bytes
from expertstore.socket_directory import socket_directories

MIN_RAM_BYTES = 4096
MAX_LOADER_THREADS = 256

_SIZES = {
    "ram": "ram_bytes",
    "page_cache": "page_cache_bytes",
    "read_buffer": "read_buffer_bytes",
    "table_ram": "table_ram_bytes",
    "default_quota": "default_quota_bytes",
}
"""Settings that take a size with its unit, and their fields."""


@dataclass(frozen=True)
class ServeConfig:
    """What ``expertd serve`` needs to know; units are in the names.

    Raises :class:`ConfigError` if a value makes no sense.
    """

    socket: Path
    """Directory of the sockets and the lock; made if missing."""
    ram_bytes: int
    """The arena's size: the budget of all models together."""
    table_ram_bytes: int | None = None
    """Of it, what is for rows of tables; None: what the models' experts leave, or an eighth if that
    is more, and nothing if no model has a table."""
    models: dict[str, ModelConfig] = field(default_factory=dict)
    """Packs to load at start, by model name, and their limits."""
    allowed_uids: tuple[int, ...] = ()
    """Who may attach besides root and the daemon's own user; in the file, names too."""
    allowed_groups: tuple[str | int, ...] = ()
    """Groups whose members may, too: names or gids."""
    writable_uids: tuple[int, ...] = ()
    """Of these, users whose workers may make the arena writable for a moment: most GPUs' drivers
    register no other memory. They can alter what everybody computes. Workers of the daemon's own
    user always may, since that user can do so anyway."""
    socket_mode: int = 0o660
    """Permissions of the sockets."""
    lock_memory: bool = True
    """mlock the arena; if that fails the daemon warns and goes on."""
    disk_io: DiskIo = DiskIo.AUTO
    """How packs are read that say nothing of their own."""
    page_cache_bytes: int | None = None
    """Of what mapped reads leave in the page cache, the most that is kept; None: a quarter of the
    memory that is free when the daemon has its arena."""
    loader_threads: int = 8
    """Reads in flight at once."""
    hint_depth: int = 2
    """Reads in flight, demanded ones among them, below which one that was hinted at is begun: as
    many as the disk still gets faster with."""
    scrub_bytes_per_second: int = 32 << 20
    """How fast resident records are verified again, to find bits that flip in RAM; 0: not."""
    stall_seconds: float = 30.0
    """How long a worker may hold up eviction before it is cut off."""
    fetch_seconds: float = 60.0
    """Deadline of a fetch whose caller gave none."""
    drain_seconds: float = 5.0
    """How long SIGTERM waits for calls in flight."""
    max_sessions: int = 256
    """Attached at once."""
    max_sessions_per_uid: int = 256
    """Of one user at once."""
    quotas: dict[int, int] = field(default_factory=dict)
    """How many bytes the sessions of a user, by uid, may keep from being evicted at once."""
    default_quota_bytes: int | None = None
    """The same for users that have no quota of their own; None: no limit."""
    policy: PolicyName = DEFAULT_POLICY
    """What stays in RAM when not all does."""
    log_format: LogFormat = LogFormat.TEXT
    """How events are written to stderr."""
    metrics: LoopbackAddress | None = None
    """Where Prometheus may scrape; None: nowhere."""
    read_buffer_bytes: int = 256 << 20
    """Records on their way to those who do not map the arena, all together."""
    tcp: TcpConfig = field(default_factory=TcpConfig)
    """Whether and to whom other hosts' reads are answered."""

    def __post_init__(self) -> None:
        if self.ram_bytes < MIN_RAM_BYTES:
            raise ConfigError(f"ram is {self.ram_bytes} bytes; give the budget, e.g. 16GiB.")
        if self.table_ram_bytes is not None and not 0 <= self.table_ram_bytes < self.ram_bytes:
            raise ConfigError(
                f"table_ram is {self.table_ram_bytes} bytes, of the {self.ram_bytes} of ram; give "
                "less, so that experts have some, too."
            )
        for name in (
            "stall_seconds",
            "fetch_seconds",
            "loader_threads",
            "hint_depth",
            "max_sessions",
            "max_sessions_per_uid",
            "read_buffer_bytes",
        ):
            if not 0 < getattr(self, name) < math.inf:
                raise ConfigError(f"{name} is {getattr(self, name)}; it must be positive.")
        if self.page_cache_bytes is not None and self.page_cache_bytes < 0:
            raise ConfigError(f"page_cache is {self.page_cache_bytes} bytes; give 0 or more.")
        if not 0 <= self.drain_seconds < math.inf:
            raise ConfigError(f"drain_seconds is {self.drain_seconds}; it must be 0 or more.")
        if self.scrub_bytes_per_second < 0:
            raise ConfigError(
                f"scrub_bytes_per_second is {self.scrub_bytes_per_second}; give 0 or more."
            )
        if self.loader_threads > MAX_LOADER_THREADS:
            raise ConfigError(
                f"loader_threads is {self.loader_threads}; give 1 to {MAX_LOADER_THREADS}."
            )
        if not 0 <= self.socket_mode <= 0o777:
            raise ConfigError(f"socket_mode is {self.socket_mode:o}; give permissions like 660.")
        if any(uid < 0 for uid in self.allowed_uids):
            raise ConfigError(f"allowed_uids is {list(self.allowed_uids)}; no uid is negative.")
        if any(uid < 0 for uid in self.writable_uids):
            raise ConfigError(f"writable_uids is {list(self.writable_uids)}; no uid is negative.")
        if any(isinstance(group, int) and group < 0 for group in self.allowed_groups):
            raise ConfigError(f"allowed_groups is {list(self.allowed_groups)}; no gid is negative.")
        for name in self.models:
            check_model_name(name)
        for uid, num_bytes in self.quotas.items():
            if num_bytes <= 0:
                raise ConfigError(f"the quota of {uid} is {num_bytes} bytes; it must be positive.")
        if self.default_quota_bytes is not None and self.default_quota_bytes <= 0:
            raise ConfigError(
                f"default_quota is {self.default_quota_bytes} bytes; it must be positive."
            )


def check_model_name(name: str) -> None:
    """Raises :class:`ConfigError` unless ``name`` can name a model."""
    if not name or len(name) > 128 or not name.isprintable() or "=" in name or "/" in name:
        raise ConfigError(
            f"{name!r} cannot name a model: give 1-128 printable characters, no = or /."
        )


def name_of_pack(pack: Path) -> str:
    """A name to serve ``pack`` under: that of its directory, if a model can have it."""
    try:
        check_model_name(pack.name)
    except ConfigError:
        return "model"
    return pack.name


def parse_model(text: str) -> tuple[str, ModelConfig]:
    """``NAME=PACK`` as given on the command line, or the name of a pack in its usual place.

    Raises :class:`ConfigError`.
    """
    name, equals, path = text.partition("=")
    pack = named_pack(Path(path or name))
    if (equals and not path) or (not equals and pack == Path(name)):
        raise ConfigError(
            f"{text!r} is not a model: write --model NAME=PACK, or a name that `expertd packs` "
            "lists."
        )
    check_model_name(name)
    return name, ModelConfig(pack.absolute())


def load_config(path: Path | None, **overrides: Any) -> ServeConfig:  # noqa: ANN401
    """The settings in TOML file ``path``, with those of ``overrides`` that are not None.

    In the file ``ram`` may stand for ``ram_bytes`` with a unit (``"16GiB"``), ``socket_mode``
    is a string in octal, and ``[models]`` maps names to packs or tables of a pack and its
    limits. Without ``socket`` it is this user's default. Raises :class:`ConfigError`.
    """
    values: dict[str, Any] = {}
    if path is not None:
        values = _read_toml(path)
    values |= {name: value for name, value in overrides.items() if value is not None}
    values.setdefault("socket", socket_directories()[0])
    if "ram_bytes" not in values:
        raise ConfigError("ram is not set; give --ram SIZE.")
    return replace(ServeConfig(Path(), MIN_RAM_BYTES), **values)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        raw = tomllib.loads(path.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not valid TOML: {error}.") from error
    defaults = {spec.name: spec for spec in fields(ServeConfig)}
    values: dict[str, Any] = {}
    for key, value in raw.items():
        name = _SIZES.get(key, key)
        if name not in defaults:
            known = ", ".join(sorted({*_SIZES, *defaults} - {*_SIZES.values()}))
            raise ConfigError(f"{path}: unknown setting {key!r}; known are {known}.")
        try:
            values[name] = _convert(name, value)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}") from error
        except (TypeError, ValueError) as error:
            raise ConfigError(f"{path}: {key} = {value!r} does not fit: {error}.") from error
    try:
        replace(ServeConfig(Path(), MIN_RAM_BYTES), **values)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return values


def _convert(name: str, value: Any) -> Any:  # noqa: ANN401
    """A TOML value as the field of that name wants it. Raises TypeError or ValueError."""
    kind = type(getattr(ServeConfig(Path(), MIN_RAM_BYTES), name))
    if name in (*_SIZES.values(), "scrub_bytes_per_second") and isinstance(value, str):
        return parse_bytes(value)
    if name in ("default_quota_bytes", "page_cache_bytes", "table_ram_bytes"):
        return _typed(value, int)
    if name == "quotas":
        return _quotas(_typed(value, dict))
    if name == "tcp":
        return TcpConfig.from_table(_typed(value, dict))
    if name == "metrics":
        return parse_loopback(_typed(value, str))
    if name == "disk_io":
        return parse_disk_io(value)
    if name == "policy":
        if value not in list(PolicyName):
            raise ValueError(f"the policies are {', '.join(PolicyName)}")
        return PolicyName(value)
    if name == "log_format":
        if value not in list(LogFormat):
            raise ValueError(f"the formats are {', '.join(LogFormat)}")
        return LogFormat(value)
    if name == "socket_mode":
        return int(_typed(value, str), 8)
    if name == "socket":
        return Path(_typed(value, str))
    if name == "models":
        models = _typed(value, dict)
        return {key: ModelConfig.from_toml(key, model) for key, model in models.items()}
    if name == "allowed_groups":
        return tuple(_typed(group, (str, int)) for group in _typed(value, list))
    if name in {"allowed_uids", "writable_uids"}:
        return tuple(uid_of(_typed(user, (str, int)), name) for user in _typed(value, list))
    return kind(_typed(value, (int, float))) if kind is float else _typed(value, kind)


def _quotas(table: dict[str, Any]) -> dict[int, int]:
    """By uid; the keys are names or uids."""
    quotas: dict[int, int] = {}
    for user, value in table.items():
        uid = uid_of(user, "quotas")
        if uid in quotas:
            raise ConfigError(f"quotas has two for uid {uid}, one by the name {user!r}; keep one.")
        quotas[uid] = _quota(user, value)
    return quotas


def _quota(user: str, value: Any) -> int:  # noqa: ANN401
    if isinstance(value, str):
        return parse_bytes(value)
    try:
        size: int = _typed(value, int)
    except TypeError as error:
        raise TypeError(f"that of {user} is a {type(value).__name__}") from error
    return size


def _typed(value: Any, kind: type | tuple[type, ...]) -> Any:  # noqa: ANN401
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"it is a {type(value).__name__}")
    return value
