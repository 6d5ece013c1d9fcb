"""One sequence's tokens, from the engine's thread to one reader in another thread or event loop."""

import asyncio
import threading
from collections import deque
from collections.abc import Sequence
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


class Channel(Generic[Item]):
    """What is sent waits here until it is received; the sender never waits.

    The sender bounds what can wait: a sequence has no more tokens than its ``max_new_tokens``.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._items: deque[Item] = deque()
        self._ended = False
        self._error: BaseException | None = None
        self._waiter: tuple[asyncio.AbstractEventLoop, asyncio.Future[None]] | None = None

    @property
    def num_waiting(self) -> int:
        """How many items were sent and not yet received."""
        return len(self._items)

    @property
    def ended(self) -> bool:
        """Whether nothing more will be sent."""
        return self._ended

    def send(self, items: Sequence[Item]) -> None:
        """Adds ``items``; after :meth:`end` they are dropped."""
        with self._changed:
            if not self._ended:
                self._items.extend(items)
                self._wake()

    def end(self, error: BaseException | None = None, *, drop: bool = False) -> None:
        """Nothing more comes; the reader gets what waits, unless ``drop``, and then ``error``.

        A second call changes nothing.
        """
        with self._changed:
            if drop:
                self._items.clear()
            if not self._ended:
                self._ended, self._error = True, error
                self._wake()

    def receive(self) -> Item | None:
        """The next item, when it has come; None at the end. Raises the error of :meth:`end`."""
        with self._changed:
            while not self._items and not self._ended:
                self._changed.wait()
            return self._next()

    async def receive_async(self) -> Item | None:
        """As :meth:`receive`, without blocking the event loop.

        Raises PreconditionError if another task already waits: a channel has one reader.
        """
        while True:
            with self._changed:
                if self._items or self._ended:
                    return self._next()
                if self._waiter is not None:
                    raise PreconditionError(
                        "Two tasks read one stream of tokens; let one read and pass them on."
                    )
                loop = asyncio.get_running_loop()
                waiter = loop.create_future()
                self._waiter = loop, waiter
            try:
                await waiter
            finally:
                with self._changed:
                    self._waiter = None

    def _next(self) -> Item | None:
        if self._items:
            return self._items.popleft()
        if self._error is not None:
            raise self._error
        return None

    def _wake(self) -> None:
        self._changed.notify_all()
        if self._waiter is not None:
            loop, waiter = self._waiter
            try:
                loop.call_soon_threadsafe(_resolve, waiter)
            except RuntimeError:
                self._waiter = None  # The reader's loop is closed.


def _resolve(waiter: "asyncio.Future[None]") -> None:
    if not waiter.done():
        waiter.set_result(None)
