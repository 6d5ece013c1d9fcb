"""How much experts were used of late: accesses, each halved once per half-life since."""

import heapq
import math
from collections.abc import Callable, Container

HALF_LIFE_STEPS = 8.0
"""Of 2 to 64 steps, what kept most hits on the routing of real models."""


class Heat:
    """The heat of keys, and which is coldest, without looking at each of them.

    Heat h at step s is kept as ``log2(h) + s / HALF_LIFE_STEPS``: all keys cool at the same pace,
    so their order does not change while time passes.
    """

    def __init__(self) -> None:
        self._step = 0
        self._value: dict[tuple[int, int], float] = {}
        # What is out of date in it is passed over; a key's value only rises.
        self._heap: list[tuple[float, tuple[int, int]]] = []

    def pass_step(self) -> None:
        """Time passes."""
        self._step += 1

    def use(self, key: tuple[int, int]) -> None:
        """An access."""
        now = self._step / HALF_LIFE_STEPS
        before = self._value.get(key)
        heat = 1.0 if before is None else 1.0 + 2.0 ** (before - now)
        self._value[key] = value = math.log2(heat) + now
        heapq.heappush(self._heap, (value, key))
        if len(self._heap) > 4 * len(self._value) + 64:
            self._heap = [(value, key) for key, value in self._value.items()]
            heapq.heapify(self._heap)

    def coldest(
        self, is_present: Callable[[tuple[int, int]], bool], kept: Container[tuple[int, int]]
    ) -> tuple[int, int]:
        """The coldest key that is present and not ``kept``. Raises LookupError if none is."""
        passed_over = []
        try:
            while self._heap:
                value, key = self._heap[0]
                if self._value[key] == value and is_present(key):
                    if key not in kept:
                        return key
                    passed_over.append((value, key))
                # What is absent comes back with its next use.
                heapq.heappop(self._heap)
        finally:
            for each in passed_over:
                heapq.heappush(self._heap, each)
        raise LookupError("nothing is present that is not kept")
