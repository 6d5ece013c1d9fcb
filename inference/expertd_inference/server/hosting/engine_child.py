"""An engine in a process of its own: the worker of one model, and what it says to the front.

The process ends when its socket does: however the front ends, no engine stays behind.
"""

import gc
import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec import structs

from expertd_client import TlsFiles
from expertd_inference.engine.budget import EngineLimits
from expertd_inference.engine.token import Token
from expertd_inference.process.attachment import attach
from expertd_inference.process.environment import garbage_kept, prepare_environment
from expertd_inference.process.reasons import reason_of
from expertd_inference.server.hosting.link import BlockingLink
from expertd_inference.server.hosting.messages import (
    PULSE_SECONDS,
    Begin,
    Cancel,
    Failure,
    Progress,
    Pulse,
    Ready,
    Refused,
    ToEngine,
)
from expertd_inference.settings import ComputeDtype, DeviceSettings, KernelsName
from expertstore.errors import ExpertdError, SequenceFailedError

if TYPE_CHECKING:
    from expertd_inference.engine.engine import Engine

CPU = "cpu"
STATS_SECONDS = 0.25
"""How often an engine says at most how it does."""


@dataclass(frozen=True, kw_only=True)
class EngineSpec:
    """Which model an engine loads, and how it computes; as a Worker's arguments."""

    model: str
    socket: str | None
    tls: TlsFiles | None = None
    pack: Path | None = None
    copies_bytes: int | None = None
    device: DeviceSettings = field(default_factory=DeviceSettings)
    dtype: ComputeDtype | None = None
    kernels: KernelsName = KernelsName.AUTO
    exact: bool = False
    activations: int = 16
    threads: int | None = None
    cores: tuple[int, ...] = ()
    """On which it computes; none for all."""
    limits: EngineLimits = field(default_factory=EngineLimits)
    reattach_seconds: float = 30.0

    @property
    def place(self) -> str:
        """Its device, and if these are not all the cores that it computes on: ``cpu 0,1``."""
        return " ".join(filter(None, (self.device.device, ",".join(map(str, self.cores)))))


def run(end: socket.socket, spec: EngineSpec) -> None:
    """Loads the model, says so, and computes until the front's end of the socket is closed."""
    # Ctrl-C and a service's end are for the front, which lets its clients' texts end first.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    link: BlockingLink[ToEngine] = BlockingLink(end, ToEngine)
    threading.Thread(target=_beat, args=(link,), name="pulse", daemon=True).start()
    with ExitStack() as stack:
        try:
            engine, outbox = _open(link, spec, stack)
        except ExpertdError as error:
            link.send(Refused(Failure.of(error)))
            return
        looking = ThreadPoolExecutor(1, "looking")
        stack.callback(looking.shutdown, cancel_futures=True)
        while (messages := link.receive()) is not None:
            for message in messages:
                _obey(message, engine, outbox, looking)


def _beat(link: BlockingLink[ToEngine]) -> None:
    """Says that the process runs, also while it loads the model or a step takes long."""
    with suppress(OSError):  # The front is gone.
        while True:
            time.sleep(PULSE_SECONDS)
            link.send(Pulse())


class Outbox:
    """What the engine's thread has for the front: one message a step."""

    def __init__(self, link: BlockingLink[ToEngine]) -> None:
        self._link = link
        self._tokens: list[tuple[int, Token]] = []
        self._ended: list[tuple[int, Failure | None]] = []
        self._said = 0.0
        self.engine: Engine | None = None
        self.relays: dict[int, Relay] = {}
        """Of the sequences that have not ended."""

    def flush(self) -> None:
        """Sends what there is."""
        if not self._tokens and not self._ended:
            return
        tokens, self._tokens = self._tokens, []
        ended, self._ended = self._ended, []
        now = time.monotonic()
        stats = None
        if self.engine is not None and (ended or now - self._said >= STATS_SECONDS):
            self._said, stats = now, self.engine.stats
        self._send(Progress(tokens, ended, stats))

    def refuse(self, id_: int, error: ExpertdError) -> None:
        """Says from any thread that a sequence did not begin."""
        self.relays.pop(id_, None)
        refuses = self.engine is not None and not self.engine.closed
        failure = structs.replace(Failure.of(error), refuses=refuses)
        self._send(Progress([], [(id_, failure)]))

    def add(self, id_: int, tokens: Sequence[Token]) -> None:
        """For the next message."""
        self._tokens += [(id_, token) for token in tokens]

    def end(self, id_: int, error: BaseException | None) -> None:
        """For the next message."""
        self.relays.pop(id_, None)
        self._ended.append((id_, None if error is None else Failure.of(error)))

    def _send(self, message: Progress) -> None:
        with suppress(OSError):  # The front is gone: so is this process, soon.
            self._link.send(message)


class Relay:
    """An engine's outlet for one sequence of the front."""

    def __init__(self, outbox: Outbox, id_: int) -> None:
        self._outbox = outbox
        self._id = id_
        self._lock = threading.Lock()
        self._cancel: Callable[[], None] | None = None
        self._cancelled = False

    def begin(self, message: Begin, engine: "Engine") -> None:
        """Has the engine begin the sequence, unless it was cancelled before."""
        if self._cancelled:
            self._outbox.relays.pop(self._id, None)
            return
        try:
            cancel = engine.relay(
                self, message.tokens, message.settings, message.origin, message.images
            )
        except ExpertdError as error:
            self._outbox.refuse(self._id, error)
            return
        except Exception as error:
            if not message.images:
                raise
            self._outbox.refuse(self._id, _not_seen(error))
            return
        with self._lock:
            self._cancel = cancel
        if self._cancelled:
            cancel()

    def cancel(self) -> None:
        """Nobody wants the sequence any more."""
        with self._lock:
            self._cancelled = True
        if self._cancel is not None:
            self._cancel()

    def send(self, items: Sequence[Token]) -> None:
        """Some that came."""
        self._outbox.add(self._id, items)

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes."""
        self._outbox.end(self._id, error)


def _not_seen(error: Exception) -> SequenceFailedError:
    """Of what the vision part, or a library that it is prepared by, did not expect."""
    failed = SequenceFailedError(
        f"The images of this prompt could not be looked at ({reason_of(error)}); this is a fault "
        "of expertd or of the model's files: please report it."
    )
    failed.__cause__ = error
    return failed


def _open(
    link: BlockingLink[ToEngine], spec: EngineSpec, stack: ExitStack
) -> tuple["Engine", Outbox]:
    attachment = stack.enter_context(
        attach(spec.model, spec.socket, tls=spec.tls, cache_bytes=spec.copies_bytes)
    )
    prepare_environment(device=spec.device.device)
    with garbage_kept():
        import torch

        from expertd_inference.engine.engine import Engine
        from expertd_inference.worker import Worker

        if spec.cores:
            os.sched_setaffinity(0, spec.cores)
        if spec.threads or spec.cores:
            torch.set_num_threads(spec.threads or len(spec.cores))
        worker = stack.enter_context(
            Worker(
                attachment,
                pack=spec.pack,
                dtype=None if spec.dtype is None else getattr(torch, spec.dtype),
                kernels=spec.kernels,
                reattach_seconds=spec.reattach_seconds,
                device=spec.device,
                exact=spec.exact,
                activations=spec.activations,
                limits=spec.limits,
            )
        )
        # Modules and model stay to the end: no later collection need look at them.
        gc.freeze()
    outbox = Outbox(link)
    engine = stack.enter_context(Engine(worker, spec.limits, outbox.flush))
    stats = engine.stats
    link.send(
        Ready(
            engine.executor,
            engine.reason,
            worker.kernels.name,
            worker.vocabulary,
            min(stats.kv_tokens, worker.context_tokens or stats.kv_tokens),
            stats,
        )
    )
    outbox.engine = engine
    return engine, outbox


def _obey(message: ToEngine, engine: "Engine", outbox: Outbox, looking: Executor) -> None:
    match message:
        case Begin(id_):
            # Before it begins, which may be its end as well.
            outbox.relays[id_] = relay = Relay(outbox, id_)
            if message.images:
                # Looking at them takes seconds, in which others' sequences begin and go on.
                looking.submit(relay.begin, message, engine)
            else:
                relay.begin(message, engine)
        case Cancel(id_):
            if (relay_or_none := outbox.relays.get(id_)) is not None:
                relay_or_none.cancel()
