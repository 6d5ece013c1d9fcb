"""Addresses that only this host can reach, and what helps where none can be listened at."""

import errno
import ipaddress
from typing import NamedTuple


class LoopbackAddress(NamedTuple):
    """Where to listen: a loopback IP address, and a port, 0 for any that is free."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def parse_loopback(text: str) -> LoopbackAddress:
    """``"127.0.0.1:9464"``, ``"[::1]:9464"`` or ``"localhost:9464"``. Raises ValueError."""
    host, colon, digits = text.rpartition(":")
    if not colon or not digits.isascii() or not digits.isdigit() or int(digits) > 65535:
        raise ValueError(f"{text!r} is not an address; write it like 127.0.0.1:9464")
    if host == "localhost":
        host = "127.0.0.1"
    elif host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        raise ValueError(f"{text!r} is not an address; write it like [::1]:9464")
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        raise ValueError(f"{host!r} is not an IP address; write it like 127.0.0.1:9464") from None
    if not address.is_loopback:
        raise ValueError(f"{host} can be reached from other hosts; give a loopback address")
    return LoopbackAddress(str(address), int(digits))


def listen_remedy(error: OSError) -> str:
    """What an operator does about an address that cannot be listened at."""
    if error.errno == errno.EAFNOSUPPORT:  # what RestrictAddressFamilies= answers
        return "give the service a network (systemd/network.conf, docs/install.md)"
    if error.errno == errno.EADDRNOTAVAIL:
        return "give an address of this host"
    return "give another port"
