"""Scrubbing: resident records are verified again and again, to find bits that flip in RAM.

Slowly, by the loader when it has nothing to read. What is damaged is withdrawn by the rule of
eviction and read from the pack when it is next asked for.
"""

import asyncio
from collections.abc import Mapping
from contextlib import suppress

from expertd.disk.loader import Loader, matches
from expertd.hosting.hosted_model import HostedModel, ModelState
from expertd.log import log_error, log_failure
from expertd.memory.arena import Arena

_BATCH_BYTES = 4 << 20
_MAX_BATCH = 256  # records
_MIN_PAUSE_SECONDS = 1 / 16  # with small records, what bounds the cost is their number


class Scrubber:
    """Goes round all models' records, ``bytes_per_second`` of them; 0: does nothing."""

    def __init__(
        self, arena: Arena, models: Mapping[str, HostedModel], loader: Loader, bytes_per_second: int
    ) -> None:
        self._arena, self._models, self._loader = arena, models, loader
        self._bytes_per_second = bytes_per_second
        self._loop = asyncio.get_running_loop()
        self._next = 0
        self._task = asyncio.create_task(self._run()) if bytes_per_second else None

    async def close(self) -> None:
        """Stops; twice is harmless."""
        if self._task is not None:
            self._task.cancel()
            with suppress(asyncio.CancelledError):
                await self._task

    async def _run(self) -> None:
        while True:
            num_bytes = 0
            try:
                for name in [*self._models]:
                    self._next = 0
                    while (model := self._models.get(name)) is not None:
                        num_bytes = await self._verify_some(model)
                        if not num_bytes:
                            break
                        await self._pause(num_bytes)
            except Exception:  # a bug of ours, which must not end all scrubbing
                log_failure("scrubbing")
            await self._pause(num_bytes)

    async def _pause(self, num_bytes: int) -> None:
        await asyncio.sleep(max(_MIN_PAUSE_SECONDS, num_bytes / self._bytes_per_second))

    async def _verify_some(self, model: HostedModel) -> int:
        """Verifies the next resident records; how many bytes they had, 0 at the model's end."""
        if model.state is not ModelState.SERVING:
            return 0
        entries = model.resident_from(self._next, _MAX_BATCH)
        num_bytes, count = 0, 0
        for entry in entries:
            num_bytes += model.record_bytes(entry)
            count += 1
            if num_bytes >= _BATCH_BYTES:
                break
        entries = entries[:count]
        if not entries:
            return 0
        self._next = entries[-1] + 1
        targets = {entry: self._target(model, entry) for entry in entries}
        done: asyncio.Future[list[int]] = self._loop.create_future()

        def check() -> None:
            damaged = [
                entry
                for entry, target in targets.items()
                if not matches(target, model.place(entry).checksum)
            ]
            self._loop.call_soon_threadsafe(_tell, done, damaged)

        # Held, so that the bytes are not given to another record beneath the check.
        model.hold(entries)
        try:
            self._loader.check(check)
            # To the thread's end, even if we are stopped: it is at the records' bytes.
            damaged = await asyncio.shield(done)
        finally:
            model.unhold(entries)
        for entry in damaged:
            self._withdraw(model, entry)
        return num_bytes

    def _target(self, model: HostedModel, entry: int) -> memoryview:
        extent = model.extent(entry)
        assert extent is not None
        return self._arena.view[extent.offset : extent.offset + extent.num_bytes]

    def _withdraw(self, model: HostedModel, entry: int) -> None:
        """Even if somebody holds it: he finds it absent and has it fetched again."""
        layer, expert = model.expert(entry)
        log_error("record damaged in RAM", model=model.name, layer=layer, expert=expert)
        model.counters.records_damaged += 1
        if model.is_resident(entry):
            model.evict([entry])


def _tell(done: asyncio.Future[list[int]], damaged: list[int]) -> None:
    if not done.done():
        done.set_result(damaged)
