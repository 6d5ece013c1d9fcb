"""Engines for tests of what stands before them: a thread plays the part of the process."""

import signal
import socket
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from expertd_inference.engine.stats import EngineStats
from expertd_inference.engine.stops import FinishReason
from expertd_inference.engine.token import Opening, Token
from expertd_inference.server.hosting.link import BlockingLink
from expertd_inference.server.hosting.messages import Begin, Failure, Progress, Ready, ToEngine

STATS = EngineStats(
    executor="program",
    reason="",
    num_steps=1,
    num_rows=1,
    rows_mean=1.0,
    num_running=0,
    num_waiting=0,
    prefix_queries=0,
    prefix_hits=0,
    num_preemptions=0,
    kv_tokens=64,
    kv_why="",
    kv_used=0.0,
    native_rows={},
)
READY = Ready("program", "", "native", 100, 64, STATS)
OPENING = Opening(0, 0.0, ((-1.0, ()),))


class Killed(Exception):  # noqa: N818 - what a part does
    """Raised by a part that ends as if the process were killed."""


class Link(BlockingLink[ToEngine]):
    """The engine's end, and what a part says by it."""

    def __init__(self, end: socket.socket) -> None:
        super().__init__(end, ToEngine)
        self.ended = threading.Event()
        """Set when the process is killed."""
        self.begun: list[Begin] = []

    def begins(self) -> list[Begin]:
        """What there is to do next; nothing at the end."""
        messages = self.receive()
        if messages is None:
            raise Killed
        begun = [message for message in messages if isinstance(message, Begin)]
        self.begun += begun
        return begun

    def token(self, begin: Begin, token: int, last: bool = False) -> None:
        """One for a sequence, as if it were the first of this engine."""
        reason = FinishReason.LENGTH if last else None
        ended: list[tuple[int, Failure | None]] = [(begin.id, None)] if last else []
        tokens = [(begin.id, Token(token, "x", finish_reason=reason, opening=OPENING))]
        self.send(Progress(tokens, ended))


Part = Callable[[Link], None]


def answers(link: Link) -> None:
    """Loads, and answers each sequence with one token."""
    link.send(READY)
    while True:
        for begin in link.begins():
            link.token(begin, 7, last=True)


class PretendedProcess:
    """As multiprocessing's; the one that starts next plays the stage's next part."""

    def __init__(self, stage: "Stage", end: socket.socket) -> None:
        self._stage, self._end = stage, end
        self._thread: threading.Thread | None = None
        self.pid = 1
        self.closed = False
        self.exitcode: int | None = None

    def start(self) -> None:
        part = self._stage.next_part()
        self._end = self._end.dup()
        self.link = Link(self._end)
        self._stage.links.append(self.link)
        self._thread = threading.Thread(target=self._play, args=(part,))
        self._thread.start()

    def join(self, timeout: float | None = None) -> None:
        assert self._thread is not None, "can only join a started process"
        self._thread.join(timeout)

    def is_alive(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def kill(self) -> None:
        self.exitcode = -signal.SIGKILL
        self.link.ended.set()
        self._end.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        assert not self.is_alive()
        self.closed = True

    def _play(self, part: Part) -> None:
        with self._end, suppress(Killed, OSError):
            part(self.link)
        if self.exitcode is None:
            self.exitcode = 0


class Stage:
    """Which engines there will be, and what they were told."""

    def __init__(self) -> None:
        self.parts: list[Part] = [answers]
        self.before_start: Callable[[], None] = lambda: None
        self.num_started = 0
        self.links: list[Link] = []
        self.processes: list[PretendedProcess] = []

    def next_part(self) -> Part:
        self.num_started += 1
        self.before_start()
        return self.parts.pop(0) if len(self.parts) > 1 else self.parts[0]

    def process(self, *, args: tuple[Any, ...], **_: object) -> PretendedProcess:
        """In the place of multiprocessing's Process."""
        self.processes.append(PretendedProcess(self, args[0]))
        return self.processes[-1]
