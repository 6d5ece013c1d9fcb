"""Who starts the daemon again when it was killed."""

import random
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from expertd_testing.daemon import Daemon
from expertd_testing.supervised import Supervised

_LAST_LINES = 20
_START_SECONDS = 30.0


class Supervisor(Protocol):
    """Runs one daemon at a time in ``directory``, whoever was killed before."""

    directory: Path

    @property
    def pid(self) -> int:
        """Of the daemon that runs."""

    def restart(self, chance: random.Random) -> float:
        """Kills it, and returns when the next one serves: after how many seconds."""

    def problems(self) -> list[str]:
        """What the daemons so far have logged that they should not have."""

    def __enter__(self) -> Self: ...

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
        /,
    ) -> None: ...


class ColdSupervisor:
    """The next daemon begins with an empty arena."""

    def __init__(
        self, directory: Path, models: Mapping[str, Path], ram: int, settings: Path
    ) -> None:
        self.directory = directory
        self._models, self._ram, self._settings = models, ram, settings
        self._problems: list[str] = []
        self._daemon: Daemon | None = None

    def __enter__(self) -> Self:
        self._daemon = self._start()
        self._daemon.wait_ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        daemon, self._daemon = self._daemon, None
        if daemon is not None:
            self._look_at(daemon)
            daemon.close()

    @property
    def pid(self) -> int:
        assert self._daemon is not None
        return self._daemon.pid

    def restart(self, chance: random.Random) -> float:
        began = time.monotonic()
        assert self._daemon is not None
        self._end(self._daemon)
        self._daemon = self._start()
        while chance.random() < 0.1:  # not all live to serve
            time.sleep(chance.uniform(0, 0.5))
            self._end(self._daemon)
            self._daemon = self._start()
        self._daemon.wait_ready()
        return time.monotonic() - began

    def problems(self) -> list[str]:
        if self._daemon is not None:
            self._look_at(self._daemon)
        return list(dict.fromkeys(self._problems))

    def _start(self) -> Daemon:
        return Daemon(self._models, ram=self._ram, socket=self.directory, config=self._settings)

    def _end(self, daemon: Daemon) -> None:
        daemon.kill()
        self._look_at(daemon)
        daemon.close()

    def _look_at(self, daemon: Daemon) -> None:
        self._problems += _signs_in(daemon.stderr)


class WarmSupervisor:
    """The stand-in for systemd: the next daemon adopts arena and directories."""

    def __init__(
        self, directory: Path, models: Mapping[str, Path], ram: int, settings: Path
    ) -> None:
        self.directory = directory
        self._num_models = len(models)
        self._systemd = Supervised(
            models, ram=ram, socket=directory, arguments=["--config", str(settings)]
        )

    def __enter__(self) -> Self:
        self._systemd.wait_ready()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._systemd.close()

    @property
    def pid(self) -> int:
        return self._systemd.pid

    def restart(self, chance: random.Random) -> float:
        began = time.monotonic()
        self._kill()
        while chance.random() < 0.1:
            time.sleep(chance.uniform(0, 0.5))
            self._kill()
        self._systemd.wait_ready(starts=len(self._systemd.runs))
        return time.monotonic() - began

    def problems(self) -> list[str]:
        stored = self._systemd.stored_names
        if len(stored) > 1 + self._num_models:
            return [f"the fd store holds {stored}"]
        return _signs_in(self._systemd.output)

    def _kill(self) -> None:
        """And waits until the next one has been started."""
        starts = len(self._systemd.runs)
        self._systemd.wait_ended(self._systemd.kill())
        deadline = time.monotonic() + _START_SECONDS
        while len(self._systemd.runs) == starts:
            if time.monotonic() > deadline:
                raise RuntimeError("the stand-in starts nothing")
            time.sleep(0.005)


def _signs_in(log: str) -> list[str]:
    """What no daemon should log."""
    for sign in ("unexpected failure", "Traceback", "record lost", "Exception", "damaged"):
        if sign in log:
            lines = log[max(0, log.index(sign) - 200) :].splitlines()[:_LAST_LINES]
            return ["the daemon logged:\n" + "\n".join(lines)]
    return []


def short_directory() -> "tempfile.TemporaryDirectory[str]":
    """For sockets, whose paths must be short."""
    return tempfile.TemporaryDirectory(prefix="expertd-")
