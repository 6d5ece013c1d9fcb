"""The settings of the TCP listener: the ``[tcp]`` table."""

import ipaddress
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Self

from expertstore.errors import ConfigError

MAX_READS = 64


@dataclass(frozen=True)
class TcpConfig:
    """Where other hosts may read records, and who they must prove to be.

    Off unless ``listen`` is given. Raises :class:`ConfigError` if the settings contradict
    each other; whether the files can be used is found out by
    :class:`~expertd.serving.certificates.Certificates`.
    """

    listen: str = ""
    """``ADDRESS:PORT``, port 0 for any that is free; empty: no TCP."""
    certificate: Path | None = None
    """PEM: the daemon's certificate, and any between it and its authority."""
    key: Path | None = None
    """PEM: its private key, not encrypted."""
    client_ca: Path | None = None
    """PEM: the authorities that sign the clients' certificates."""
    allowed_names: tuple[str, ...] = ()
    """Names in clients' certificates; a leading ``*.`` stands for one label."""
    max_reads: int = 4
    """Reads of one name at once."""
    plaintext: bool = False
    """No TLS and no identity; on loopback addresses only."""

    def __post_init__(self) -> None:
        if not self.listen:
            if self.certificate or self.key or self.client_ca or self.allowed_names:
                raise ConfigError('tcp has settings but no listen; give e.g. "0.0.0.0:7443".')
            return
        host, _ = self.address
        if not 1 <= self.max_reads <= MAX_READS:
            raise ConfigError(f"tcp.max_reads is {self.max_reads}; give 1 to {MAX_READS}.")
        secured = {
            "certificate": self.certificate,
            "key": self.key,
            "client_ca": self.client_ca,
            "allowed_names": self.allowed_names,
        }
        if self.plaintext:
            self._check_plaintext(host, [name for name, value in secured.items() if value])
            return
        for name, value in secured.items():
            if not value:
                raise ConfigError(
                    f"tcp.{name} is not set; TCP is served with mutual TLS only, which needs "
                    f"{', '.join(secured)}."
                )
        for name in self.allowed_names:
            if not name.isprintable() or not name.removeprefix("*.") or "*" in name[1:]:
                raise ConfigError(
                    f"tcp.allowed_names has {name!r}; give names as certificates have them, "
                    "with * only as the whole first label."
                )

    @property
    def enabled(self) -> bool:
        """Whether there is a TCP listener."""
        return bool(self.listen)

    @property
    def address(self) -> tuple[str, int]:
        """IP address and port. Raises :class:`ConfigError` unless ``listen`` is one."""
        host, _, port = self.listen.rpartition(":")
        host = "127.0.0.1" if host == "localhost" else host
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            host = ""
        try:
            ipaddress.ip_address(host)
            if not port.isascii() or not 0 <= int(port) <= 65535:
                raise ValueError
        except ValueError:
            raise ConfigError(
                f"tcp.listen is {self.listen!r}; give an IP address and a port, e.g. "
                '"0.0.0.0:7443" or "[::]:7443".'
            ) from None
        return host, int(port)

    @classmethod
    def from_table(cls, table: dict[str, Any]) -> Self:
        """From TOML. Raises :class:`ConfigError`, TypeError."""
        known = {spec.name: spec.default for spec in fields(cls)}
        values: dict[str, Any] = {}
        for name, value in table.items():
            if name not in known:
                raise ConfigError(
                    f"unknown setting tcp.{name}; known are {', '.join(sorted(known))}."
                )
            if name in ("certificate", "key", "client_ca"):
                values[name] = Path(_typed(name, value, str)).absolute() if value else None
            elif name == "allowed_names":
                names = _typed(name, value, list)
                values[name] = tuple(_typed(name, each, str) for each in names)
            else:
                values[name] = _typed(name, value, type(known[name]))
        return cls(**values)

    def _check_plaintext(self, host: str, secured: list[str]) -> None:
        if not ipaddress.ip_address(host).is_loopback:
            raise ConfigError(
                f"tcp.plaintext is refused on {self.listen}, which other hosts can reach: give a "
                "loopback address, or certificates instead."
            )
        if secured:
            raise ConfigError(
                f"tcp.plaintext contradicts tcp.{secured[0]}: without TLS nobody looks at it."
            )


def _typed(name: str, value: Any, kind: type) -> Any:  # noqa: ANN401
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise TypeError(f"{name} is a {type(value).__name__}")
    return value
