"""Records for one Read: the next are read while one is sent, in memory that all Reads share."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence

AHEAD_BYTES = 8 << 20
"""About as many small records as it takes to keep a disk busy."""


class ByteBudget:
    """So many bytes, for who asks first. One that asks for more than there are gets them alone."""

    def __init__(self, num_bytes: int) -> None:
        self._num_bytes = num_bytes
        self.used = 0
        self._waiters: deque[tuple[int, asyncio.Future[None]]] = deque()

    def __repr__(self) -> str:
        return f"ByteBudget({self.used} of {self._num_bytes}, {len(self._waiters)} waiting)"

    async def take(self, num_bytes: int) -> None:
        """Waits for its turn and for room."""
        if self.try_take(num_bytes):
            return
        waiter = (num_bytes, asyncio.get_running_loop().create_future())
        self._waiters.append(waiter)
        try:
            await waiter[1]
        except asyncio.CancelledError:
            if waiter in self._waiters:
                self._waiters.remove(waiter)
                self._pass_on()  # it may have been in the way of smaller ones
            else:
                self.give(num_bytes)
            raise

    def try_take(self, num_bytes: int) -> bool:
        """Takes them if there is room and nobody waits; whether it did."""
        if self._waiters or not self._fits(num_bytes):
            return False
        self.used += num_bytes
        return True

    def give(self, num_bytes: int) -> None:
        """Gives back."""
        self.used -= num_bytes
        self._pass_on()

    def _fits(self, num_bytes: int) -> bool:
        return not self.used or self.used + num_bytes <= self._num_bytes

    def _pass_on(self) -> None:
        while self._waiters and self._fits(self._waiters[0][0]):
            num_bytes, future = self._waiters.popleft()
            if future.cancelled():
                continue
            self.used += num_bytes
            future.set_result(None)


async def read_ahead(
    entries: Sequence[int],
    read: Callable[[int], Awaitable[bytes]],
    size: Callable[[int], int],
    budget: ByteBudget,
) -> AsyncGenerator[tuple[int, bytes]]:
    """Entries with their records, each within ``budget`` until the next is asked for.

    Reading ahead, by one record or as many as fit into ``AHEAD_BYTES``, takes room only where
    nobody waits for it, so it delays no other stream. What ``read`` raises comes when it is
    that entry's turn.
    """
    ahead: deque[asyncio.Future[bytes]] = deque()  # of the entries from here on
    held = 0

    def start(entry: int) -> None:
        task = asyncio.ensure_future(read(entry))
        task.add_done_callback(_retrieve)
        ahead.append(task)

    try:
        for position, entry in enumerate(entries):
            if not ahead:
                await budget.take(size(entry))
                held += size(entry)
                start(entry)
            while (last := position + len(ahead)) < len(entries):
                following = size(entries[last])
                beyond = held - size(entry) + following
                if len(ahead) > 1 and beyond > AHEAD_BYTES:
                    break
                if not budget.try_take(following):
                    break
                held += following
                start(entries[last])
            data = await ahead.popleft()
            yield entry, data
            del data
            held -= size(entry)
            budget.give(size(entry))
    finally:
        for task in ahead:
            task.cancel()
        budget.give(held)


def _retrieve(task: "asyncio.Future[bytes]") -> None:
    """A failure that nobody comes to ask for is not worth a word."""
    if not task.cancelled():
        task.exception()
