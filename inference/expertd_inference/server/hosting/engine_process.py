"""The front's side of an engine's process: starting it, and noticing that it ended."""

import asyncio
import multiprocessing
import signal
import socket
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess

import msgspec

from expertd_inference.process.fork_server import fork_context
from expertd_inference.process.reasons import reason_of
from expertd_inference.server.hosting import engine_child
from expertd_inference.server.hosting.engine_child import CPU, EngineSpec
from expertd_inference.server.hosting.link import LoopLink
from expertd_inference.server.hosting.messages import (
    PULSE_SECONDS,
    FromEngine,
    Progress,
    Ready,
    Refused,
)
from expertstore.errors import StepFailedError, UnavailableError

CLOSE_SECONDS = 10.0
"""How long an engine may take to end, its step included, before it is killed."""
MAX_SILENT_PULSES = 12
"""An engine from which nothing was heard for so many pulses in a row is killed."""
_starting = asyncio.Lock()
"""multiprocessing starts processes from one thread at a time."""


class EngineProcess:
    """One engine, from its start to its end; :meth:`start` makes it.

    ``on_progress`` is called in the event loop with what came of each step.
    """

    def __init__(self, on_progress: Callable[[Progress], None]) -> None:
        loop = asyncio.get_running_loop()
        self.ended = asyncio.Event()
        """Set once its socket is closed: it was killed, or it obeyed :meth:`close`."""
        self._on_progress = on_progress
        self._num_silent = 0
        self._listening: asyncio.TimerHandle | None = None
        self._greeting: asyncio.Future[Ready | None] = loop.create_future()
        self._process: BaseProcess | None = None
        self._exit_code: int | None = None
        self._link: LoopLink[FromEngine] = LoopLink(FromEngine, self._receive, self._end)

    @classmethod
    async def start(
        cls, spec: EngineSpec, on_progress: Callable[[Progress], None]
    ) -> "EngineProcess":
        """Returns once the model is loaded. Raises what loading it raises.

        UnavailableError if no process can be had, StepFailedError if it ends before that.
        """
        engine = cls(on_progress)
        try:
            await engine._launch(spec)
            if await engine._greeting is None:
                await engine.close()
                raise StepFailedError(
                    f"The engine of {spec.model} {engine.fate} while it loaded the model; the "
                    "server's log may say why, and the kernel's if memory is short."
                )
        except BaseException:
            await engine.close()
            raise
        return engine

    @property
    def ready(self) -> Ready:
        """What the engine said once the model was loaded."""
        ready = self._greeting.result()
        assert ready is not None
        return ready

    @property
    def fate(self) -> str:
        """How the process ended, once it is closed."""
        if self._num_silent >= MAX_SILENT_PULSES:
            return f"did not run for {MAX_SILENT_PULSES * PULSE_SECONDS:g} s and was killed"
        if self._exit_code is not None and self._exit_code < 0:
            return f"was killed by {signal.Signals(-self._exit_code).name}"
        return "ended"

    @property
    def pid(self) -> int | None:
        """Of the process; None before it has one, and after its end."""
        return None if self._process is None else self._process.pid

    def send(self, message: msgspec.Struct) -> None:
        """Nothing comes of it if the process has ended."""
        self._link.send(message)

    def abandon(self) -> None:
        """Hears no more of it, and lets it end."""
        self._link.close()

    async def close(self) -> None:
        """Ends the process after its step, or kills it. A second call does nothing."""
        self.abandon()
        process, self._process = self._process, None
        if process is None:
            return
        await asyncio.to_thread(process.join, CLOSE_SECONDS)
        if process.is_alive():
            process.kill()
            await asyncio.to_thread(process.join)
        self._exit_code = process.exitcode
        process.close()  # Its descriptors would stay until some garbage collection.

    async def _launch(self, spec: EngineSpec) -> None:
        loop = asyncio.get_running_loop()
        try:
            ours, theirs = socket.socketpair()
            with theirs:
                ours.setblocking(False)
                await loop.create_connection(lambda: self._link, sock=ours)
                await self._start(spec, theirs)
        except (OSError, EOFError) as error:
            raise UnavailableError(
                f"No process can be had for the engine of {spec.model}: {reason_of(error)}; end "
                "what takes the host's processes, memory or open files, or raise their limits."
            ) from error
        self._listening = loop.call_later(PULSE_SECONDS, self._listen)

    async def _start(self, spec: EngineSpec, theirs: socket.socket) -> None:
        process = _process_of(spec)(
            target=engine_child.run, args=(theirs, spec), name=f"engine of {spec.model}"
        )
        async with _starting:
            starting = asyncio.ensure_future(asyncio.to_thread(process.start))
            try:
                await asyncio.shield(starting)
            finally:
                # Its thread goes on if this task is cancelled: then there is a process to end.
                await asyncio.wait({starting})
                if starting.exception() is None:
                    self._process = process

    def _listen(self) -> None:
        """Counts pulses that did not come; not seconds, of which this process may lose some."""
        self._num_silent += 1
        if self._num_silent < MAX_SILENT_PULSES:
            loop = asyncio.get_running_loop()
            self._listening = loop.call_later(PULSE_SECONDS, self._listen)
        elif self._process is not None:
            self._process.kill()

    def _receive(self, message: FromEngine) -> None:
        self._num_silent = 0
        match message:
            case Progress():
                self._on_progress(message)
            case Ready():
                self._greeting.set_result(message)
            case Refused(failure):
                self._greeting.set_exception(failure.error())

    def _end(self) -> None:
        self.ended.set()
        if self._listening is not None:
            self._listening.cancel()
        if not self._greeting.done():
            self._greeting.set_result(None)
        with suppress(BaseException):
            self._greeting.exception()  # It was noticed, if only here.


def _process_of(spec: EngineSpec) -> Callable[..., BaseProcess]:
    """Of processes that have imported torch already, but for GPUs, which no fork may touch."""
    if spec.device.device != CPU:
        return multiprocessing.get_context("spawn").Process
    return fork_context().Process
