"""One sequence's tokens, from the engine's thread to one reader in another thread or event loop."""

import asyncio
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from queue import Empty, SimpleQueue
from typing import Generic, Protocol, TypeVar

from expertstore.errors import PreconditionError

Item = TypeVar("Item")
Sent = TypeVar("Sent", contravariant=True)


class Outlet(Protocol[Sent]):
    """Where one sequence's tokens go; the engine's thread calls it, and it never waits."""

    def send(self, items: Sequence[Sent]) -> None:
        """Some that came."""

    def end(self, error: BaseException | None = None) -> None:
        """Nothing more comes; after the last token, or because of ``error``."""


@dataclass(frozen=True)
class _End:
    error: BaseException | None


class Channel(Generic[Item]):
    """What is sent waits here until it is received; the sender never waits.

    The sender bounds what can wait: a sequence has no more tokens than its ``max_new_tokens``.

    The reader may be interrupted anywhere by a signal's exception, and the engine must not wait
    for a lock that the reader held then. So no method takes a lock but that inside the queue, which
    no signal interrupts.
    """

    def __init__(self) -> None:
        self._sent: SimpleQueue[Item | _End] = SimpleQueue()
        self._ended = False
        self._drops = False
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    @property
    def num_waiting(self) -> int:
        """How many items were sent and not yet received."""
        return 0 if self._drops else max(0, self._sent.qsize() - self._ended)

    @property
    def ended(self) -> bool:
        """Whether nothing more will be sent."""
        return self._ended

    def send(self, items: Sequence[Item]) -> None:
        """Adds ``items``; after :meth:`end` they are dropped."""
        if not self._ended:
            for item in items:
                self._sent.put(item)
            self._wake()

    def end(self, error: BaseException | None = None, *, drop: bool = False) -> None:
        """Nothing more comes; the reader gets what waits, unless ``drop``, and then ``error``.

        A second call changes nothing.
        """
        if drop:
            self._drops = True
        if not self._ended:
            self._ended = True
            self._sent.put(_End(error))
            self._wake()

    def receive(self) -> Item | None:
        """The next item, when it has come; None at the end. Raises the error of :meth:`end`."""
        return self._received(self._sent.get())

    async def receive_async(self) -> Item | None:
        """As :meth:`receive`, without blocking the event loop.

        Raises PreconditionError if another task already waits: a channel has one reader.
        """
        while True:
            with suppress(Empty):
                return self._received(self._sent.get_nowait())
            if self._waiter is not None:
                raise PreconditionError(
                    "Two tasks read one stream of tokens; let one read and pass them on."
                )
            loop = asyncio.get_running_loop()
            waiter = loop.create_future()
            self._waiter = loop, waiter
            try:
                # What is sent from now on wakes; what came just before does not.
                if self._sent.empty():
                    await waiter
            finally:
                self._waiter = None

    def _received(self, item: Item | _End) -> Item | None:
        while self._drops and not isinstance(item, _End):
            item = self._sent.get()
        if not isinstance(item, _End):
            return item
        self._sent.put(item)  # for whoever asks again
        if item.error is not None:
            raise item.error
        return None

    def _wake(self) -> None:
        if (waiting := self._waiter) is not None:
            loop, waiter = waiting
            try:
                loop.call_soon_threadsafe(_resolve, waiter)
            except RuntimeError:
                self._waiter = None  # The reader's loop is closed.


def _resolve(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
