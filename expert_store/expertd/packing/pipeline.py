"""Steps encoded ahead of the one that is written: reading, solving and writing overlap."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from expertd.packing.scratch import Scratch

S = TypeVar("S")
R = TypeVar("R")

NUM_AHEAD = 2
"""While one step is written, one is read and one is solved."""


def encode_ahead(
    encode: Callable[[S, Scratch], R], steps: Iterable[tuple[int, S]]
) -> Generator[tuple[int, S, R], None, None]:
    """The numbered steps in their order, each with its result, which is gone when it goes on.

    ``encode`` runs in threads of its own. An error of a step is raised when its turn comes. Close
    the generator to end it early: it waits for what has begun.
    """
    waiting = iter(steps)
    pending: deque[tuple[int, S, Scratch, Future[R]]] = deque()
    pool = ThreadPoolExecutor(NUM_AHEAD, "expertd-encoder")

    def begin(scratch: Scratch) -> None:
        for index, step in waiting:
            future = pool.submit(encode, step, scratch)
            pending.append((index, step, scratch, future))
            return

    try:
        for _ in range(1 + NUM_AHEAD):
            begin(Scratch())
        while pending:
            index, step, scratch, future = pending.popleft()
            yield index, step, future.result()
            scratch.reset()
            begin(scratch)
    finally:
        pool.shutdown(cancel_futures=True)
