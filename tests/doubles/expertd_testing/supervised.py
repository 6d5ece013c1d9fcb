"""A real daemon for tests, under the stand-in for systemd."""

import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from expertd_testing.standin_systemd import StandInSystemd
from expertstore.shared.handshake import ATTACH_SOCKET


class Supervised(StandInSystemd):
    """``expertd serve`` as a service. ``socket`` is the directory that it serves in."""

    def __init__(
        self,
        models: Mapping[str, Path],
        *,
        ram: int | str,
        socket: Path,
        arguments: Sequence[str] = (),
        activated: bool = True,
        **options: Any,
    ) -> None:
        self.socket = socket
        command = [sys.executable, "-m", "expertd", "serve", "--socket", str(socket)]
        command += ["--ram", str(ram)]
        for name, pack in models.items():
            command += ["--model", f"{name}={pack}"]
        attach_path = socket / ATTACH_SOCKET if activated else None
        super().__init__([*command, *arguments], attach_path=attach_path, **options)

    def next_start(self, **replaced: object) -> None:
        """Changes options of the command line for the starts to come, as ``ram=...``."""
        for name, value in replaced.items():
            self.command[self.command.index(f"--{name}") + 1] = str(value)


@contextmanager
def supervised(
    models: Mapping[str, Path], *, ram: int | str = 64 << 20, **options: Any
) -> Iterator[Supervised]:
    """A service that serves ``models`` until the block ends; ready when it begins."""
    with (
        tempfile.TemporaryDirectory(prefix="expertd-") as private,
        Supervised(models, ram=ram, socket=Path(private) / "s", **options) as service,
    ):
        service.wait_ready()
        yield service
