"""The front's side of an engine's process: starting it, and noticing that it ended."""

import asyncio
import multiprocessing
import socket
from collections.abc import Callable
from contextlib import suppress
from multiprocessing.process import BaseProcess

import msgspec

from expertd_inference.server.hosting import engine_child
from expertd_inference.server.hosting.engine_child import EngineSpec
from expertd_inference.server.hosting.link import LoopLink
from expertd_inference.server.hosting.messages import FromEngine, Progress, Ready, Refused
from expertstore.errors import StepFailedError

CPU = "cpu"
CLOSE_SECONDS = 10.0
"""How long an engine may take to end, its step included, before it is killed."""
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
        self._greeting: asyncio.Future[Ready] = loop.create_future()
        self._process: BaseProcess | None = None
        self._link: LoopLink[FromEngine] = LoopLink(FromEngine, self._receive, self._end)

    @classmethod
    async def start(
        cls, spec: EngineSpec, on_progress: Callable[[Progress], None]
    ) -> "EngineProcess":
        """Returns once the model is loaded. Raises what loading it raises."""
        engine = cls(on_progress)
        try:
            await engine._launch(spec)
            await engine._greeting
        except BaseException:
            await engine.close()
            raise
        return engine

    @property
    def ready(self) -> Ready:
        """What the engine said once the model was loaded."""
        return self._greeting.result()

    @property
    def pid(self) -> int | None:
        """Of the process; None before it has one."""
        return None if self._process is None else self._process.pid

    def send(self, message: msgspec.Struct) -> None:
        """Nothing comes of it if the process has ended."""
        self._link.send(message)

    def abandon(self) -> None:
        """Hears no more of it, and lets it end."""
        self._link.close()

    async def close(self) -> None:
        """Ends the process after its step, or kills it. A second call waits, too."""
        self.abandon()
        process = self._process
        if process is None:
            return
        await asyncio.to_thread(process.join, CLOSE_SECONDS)
        if process.is_alive():
            process.kill()
            await asyncio.to_thread(process.join)

    async def _launch(self, spec: EngineSpec) -> None:
        ours, theirs = socket.socketpair()
        self._process = process = _process_of(spec)(
            target=engine_child.run, args=(theirs, spec), name=f"engine of {spec.model}"
        )
        with theirs:
            async with _starting:
                await asyncio.to_thread(process.start)
        ours.setblocking(False)
        await asyncio.get_running_loop().create_connection(lambda: self._link, sock=ours)

    def _receive(self, message: FromEngine) -> None:
        match message:
            case Progress():
                self._on_progress(message)
            case Ready():
                self._greeting.set_result(message)
            case Refused(failure):
                self._greeting.set_exception(failure.error())

    def _end(self) -> None:
        self.ended.set()
        if not self._greeting.done():
            self._greeting.set_exception(
                StepFailedError("The engine's process ended while it loaded the model.")
            )
        with suppress(BaseException):
            self._greeting.exception()  # It was noticed, if only here.


def _process_of(spec: EngineSpec) -> Callable[..., BaseProcess]:
    """Of processes that have imported torch already, but for GPUs, which no fork may touch."""
    if spec.device.device != CPU:
        return multiprocessing.get_context("spawn").Process
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["expertd_inference.process.preload"])
    return context.Process
