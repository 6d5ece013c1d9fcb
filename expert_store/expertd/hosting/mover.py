"""Moving records that are in the way, as :mod:`expertd.hosting.compaction` decides."""

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from expertd.hosting.compaction import next_move
from expertd.hosting.hosted_model import HostedModel, RecordKey
from expertd.memory.extents import Extent, Extents


class KeptRecord(NamedTuple):
    """A resident record that must not be evicted, but may move.

    ``num_holds``: how many holds do not hinder that. ``may_reload``: if it cannot be moved, it
    may be evicted and read again.
    """

    record: RecordKey
    num_holds: int
    may_reload: bool


class Mover:
    """Copies records within the arena; ``copy`` copies an extent's bytes on any thread."""

    def __init__(
        self,
        extents: Extents,
        copy: Callable[[Extent, Extent], None],
        models: Mapping[str, HostedModel],
    ) -> None:
        self._extents, self._copy, self._models = extents, copy, models
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def is_busy(self) -> bool:
        """Whether a thread is copying."""
        return bool(self._tasks)

    async def step(self, kept: Sequence[KeptRecord]) -> bool | RecordKey:
        """Moves one record, or makes room for that; False if there is nothing to do but wait.

        Where none can be moved, one is evicted that may be read again: it is the result. Call it
        when all that lies in the arena is ``kept`` or can be evicted, and while nobody allocates.
        """
        rows: list[tuple[Extent, KeptRecord]] = []
        for each in kept:
            model, entry = each.record
            extent = model.extent(entry)
            if extent is None or model.num_holds(entry) > each.num_holds:
                return False  # by a call that is about to let go of it
            rows.append((extent, each))
        rows.sort(key=lambda row: row[0])
        move = next_move([extent for extent, _ in rows], self._extents.bytes_total)
        if move is None:
            for _, (record, _, may_reload) in rows:
                if may_reload:
                    record.model.evict([record.entry])
                    return record
            return False
        try:
            self._extents.take(move.target)
        except ValueError:
            return self._clear(move.target)
        # To its end, even if the caller goes away: a thread is at the arena's bytes.
        task = asyncio.create_task(self._move(rows[move.number][1], move.target))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        await asyncio.shield(task)
        return True

    async def close(self) -> None:
        """Waits for copies under way."""
        await asyncio.gather(*self._tasks)

    def _clear(self, extent: Extent) -> bool:
        """Evicts what lies in ``extent``; whether that was anything."""
        start, end = extent.offset, extent.offset + extent.num_bytes
        cleared = False
        for model in self._models.values():
            entries = model.evictable()
            offsets, lengths = model.places_of(entries)
            inside = entries[(offsets < end) & (offsets + lengths > start)]
            if len(inside):
                model.evict(inside.tolist())
                cleared = True
        return cleared

    async def _move(self, kept: KeptRecord, target: Extent) -> None:
        """Copies a record into ``target``, which is allocated, and shows it there."""
        model, entry = kept.record
        source = model.extent(entry)
        assert source is not None
        await asyncio.to_thread(self._copy, source, target)
        # Nobody else allocates meanwhile, so what was copied is still the record's bytes. But
        # its model may have been unloaded, or a thread of ours be reading it, whom no epoch
        # protects.
        if model.extent(entry) == source and model.num_holds(entry) <= kept.num_holds:
            model.move(entry, target)
        else:
            self._extents.free(target)
