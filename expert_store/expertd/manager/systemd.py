"""The service manager above us: what it gave this process, and what we tell it.

systemd's three small protocols, spoken directly: sd_listen_fds(3) (descriptors from 3 on,
announced by ``LISTEN_FDS``), sd_notify(3) (datagrams of ``NAME=VALUE`` lines to
``NOTIFY_SOCKET``, with descriptors for its fd store) and sd_watchdog_enabled(3). Started by hand
there is no manager, and everything here does nothing.
"""

import asyncio
import os
import socket
from array import array
from collections.abc import MutableMapping, Sequence
from contextlib import suppress
from typing import NamedTuple

from expertd.log import log_warning

FIRST_DESCRIPTOR = 3
ATTACH_NAME = "attach"
"""FileDescriptorName of the socket unit's listening attach socket."""

VARIABLES = frozenset(
    {
        "NOTIFY_SOCKET", "FDSTORE", "WATCHDOG_PID", "WATCHDOG_USEC",
        "LISTEN_PID", "LISTEN_PIDFDID", "LISTEN_FDS", "LISTEN_FDNAMES",
    }
)  # fmt: skip
"""How a manager speaks to the process that it starts, and to none that this one starts."""

_DELIVERY_SECONDS = 5.0
_RETRY_SECONDS = 0.002


class Passed(NamedTuple):
    """A descriptor that the manager passed to this process, ours to close."""

    name: str
    fd: int


class Manager:
    """What stands above this process; :meth:`take` reads it from the environment.

    What cannot be delivered is logged and forgotten: a daemon that serves is worth more than
    one that is known to serve.
    """

    def __init__(
        self,
        *,
        address: str | None = None,
        descriptors: Sequence[Passed] = (),
        watchdog_seconds: float | None = None,
        max_stored: int | None = None,
    ) -> None:
        self.watchdog_seconds = watchdog_seconds
        """Within this time it wants to hear of us; None: no watchdog."""
        self.max_stored = max_stored
        """Room of its fd store; None if it does not say (before systemd 254)."""
        self._descriptors = list(descriptors)
        self._address = _socket_address(address) if address else None
        self._socket: socket.socket | None = None
        if self._address is not None:
            self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC)
            self._socket.setblocking(False)

    @classmethod
    def take(cls, environment: MutableMapping[str, str] | None = None) -> "Manager":
        """The manager that ``environment`` (the process's own) tells of.

        The variables are removed: what this process starts must not speak in its name.
        """
        variables = os.environ if environment is None else environment
        address = variables.pop("NOTIFY_SOCKET", None)
        room = variables.pop("FDSTORE", "")
        return cls(
            address=address,
            descriptors=_take_descriptors(variables),
            watchdog_seconds=_take_watchdog(variables),
            max_stored=int(room) if room.isdecimal() else None,
        )

    @property
    def is_there(self) -> bool:
        """Whether anybody hears what is told."""
        return self._socket is not None

    def take_descriptors(self, name: str) -> list[int]:
        """The descriptors passed under ``name``, from now on the caller's to close."""
        found = [each.fd for each in self._descriptors if each.name == name]
        self._descriptors = [each for each in self._descriptors if each.name != name]
        return found

    def take_rest(self) -> list[Passed]:
        """All other descriptors, from now on the caller's to close."""
        rest, self._descriptors = self._descriptors, []
        return rest

    async def ready(self) -> None:
        """This process serves."""
        await self._tell("READY=1\nSTATUS=serving")

    async def stopping(self) -> None:
        """It begins to stop."""
        await self._tell("STOPPING=1\nSTATUS=stopping")

    async def status(self, text: str) -> None:
        """One line for ``systemctl status``."""
        await self._tell(f"STATUS={' '.join(text.split())}")

    async def alive(self) -> None:
        """Feeds the watchdog."""
        await self._tell("WATCHDOG=1")

    async def store(self, name: str, fd: int) -> None:
        """Puts a descriptor into the fd store: our next process gets it.

        Without a store, or when it is full, the manager drops it, and says so in its own log.
        """
        await self._tell(f"FDSTORE=1\nFDNAME={name}\nFDPOLL=0", [fd])

    async def remove(self, name: str) -> None:
        """Takes all descriptors of that name out of the fd store."""
        await self._tell(f"FDSTOREREMOVE=1\nFDNAME={name}")

    async def barrier(self) -> None:
        """Returns once all that was told before has been acted upon."""
        if self._socket is None:
            return
        loop = asyncio.get_running_loop()
        ours, theirs = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        closed = asyncio.Event()
        try:
            try:
                await self._tell("BARRIER=1", [theirs])
            finally:
                os.close(theirs)  # the manager closes the other copy when it comes to it
            loop.add_reader(ours, closed.set)
            async with asyncio.timeout(_DELIVERY_SECONDS):
                await closed.wait()
        except TimeoutError:
            log_warning("service manager is slow", waited_seconds=_DELIVERY_SECONDS)
        finally:
            loop.remove_reader(ours)
            os.close(ours)

    def close(self) -> None:
        """Closes what was not taken. Twice is harmless."""
        for _, fd in self.take_rest():
            os.close(fd)
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    async def _tell(self, message: str, descriptors: Sequence[int] = ()) -> None:
        if self._socket is None or self._address is None:
            return
        control = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array("i", descriptors))]
        try:
            async with asyncio.timeout(_DELIVERY_SECONDS):
                while self._socket is not None:
                    with suppress(BlockingIOError):  # its queue is short, and it may be busy
                        self._socket.sendmsg(
                            [message.encode()],
                            control if descriptors else [],
                            socket.MSG_NOSIGNAL,
                            self._address,
                        )
                        return
                    await asyncio.sleep(_RETRY_SECONDS)
        except (OSError, TimeoutError) as error:  # gone, or stuck
            log_warning("service manager not told", message=message.splitlines()[0], cause=error)


def _socket_address(address: str) -> str | None:
    if address.startswith("/"):
        return address
    if address.startswith("@"):
        return "\0" + address[1:]
    log_warning("service manager not told", cause=f"NOTIFY_SOCKET is {address!r}, no Unix socket")
    return None


def _take_descriptors(variables: MutableMapping[str, str]) -> list[Passed]:
    variables.pop("LISTEN_PIDFDID", None)
    pid, count = variables.pop("LISTEN_PID", ""), variables.pop("LISTEN_FDS", "")
    names = variables.pop("LISTEN_FDNAMES", "").split(":")
    if pid != str(os.getpid()) or not count.isdecimal():
        return []  # meant for another process
    passed = []
    for index in range(int(count)):
        fd = FIRST_DESCRIPTOR + index
        try:
            os.set_inheritable(fd, False)
        except OSError as error:
            log_warning("passed descriptor is not there", fd=fd, cause=error)
            continue
        passed.append(Passed(names[index] if index < len(names) else "", fd))
    return passed


def _take_watchdog(variables: MutableMapping[str, str]) -> float | None:
    pid, interval = variables.pop("WATCHDOG_PID", ""), variables.pop("WATCHDOG_USEC", "")
    if pid not in ("", str(os.getpid())) or not interval.isdecimal() or not int(interval):
        return None
    return int(interval) / 1e6
