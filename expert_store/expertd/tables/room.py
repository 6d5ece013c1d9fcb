"""The part of the arena that is for rows: how large it is, and which table has what of it."""

from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path

from expertd.memory.arena import Arena
from expertd.memory.extents import Extent, Extents
from expertd.tables.hosted_table import HostedTable
from expertd.tables.table_file import TableFile
from expertstore.errors import CapacityError
from expertstore.pack.layout import PAGE_BYTES
from expertstore.pack.manifest import Manifest
from expertstore.pack.table import Table
from expertstore.shared.row_cache import RowPlaces, sets_for, sets_in
from expertstore.sizes import format_bytes, size_to_give

_SHARE = 8
"""Without a setting, rows get one in so many bytes of the budget, or what experts leave."""


class TableRoom:
    """The last ``num_bytes`` of the arena, for the tables of ``num_models`` models and more."""

    def __init__(self, arena: Arena, num_bytes: int, num_models: int) -> None:
        self.num_bytes = num_bytes
        self._arena = arena
        self._extents = Extents(num_bytes)
        self._begin = arena.num_bytes - num_bytes
        self._num_to_come = num_models
        self._taken: dict[HostedTable, Extent] = {}

    def __repr__(self) -> str:
        return f"TableRoom({self._extents})"

    def open(self, name: str, pack: Path, manifest: Manifest) -> list[HostedTable]:
        """The tables of a model about to be loaded, with an equal share of the room.

        Raises :class:`PackError`, and :class:`CapacityError` if that share does not hold what one
        token reads.
        """
        if not manifest.tables:
            return []
        share = self._extents.bytes_free // max(1, self._num_to_come)
        with ExitStack() as undo:
            tables = []
            for table, places in zip(
                manifest.tables, self._divide(name, manifest.tables, share), strict=True
            ):
                file = TableFile(pack, table)
                undo.callback(file.close)
                tables.append(self._host(file, places))
                undo.callback(self._forget, tables[-1])
            undo.pop_all()
        self._num_to_come -= 1
        return tables

    async def close(self, tables: Iterable[HostedTable]) -> None:
        """Ends reads of a model's tables, and takes their room back."""
        for table in tables:
            await table.close()
            self._forget(table)

    def _divide(self, name: str, tables: Sequence[Table], share: int) -> list[RowPlaces]:
        """What each gets of ``share``, by size; without its place yet."""
        least = [_needed(table, table.rows_per_token) for table in tables]
        if sum(least) > share:
            raise CapacityError(
                f"the tables of {name!r} need {format_bytes(sum(least))} of RAM for the rows that "
                f"one token reads, and {format_bytes(share)} are left of what is for rows; start "
                f"the daemon with --table-ram {size_to_give(self.num_bytes + sum(least) - share)} "
                "or more, of --ram.",
                requested=sum(least),
                available=share,
                unit="bytes",
            )
        spare = share - sum(least)
        total = sum(table.num_rows * table.row_bytes for table in tables)
        places = []
        for table, minimum in zip(tables, least, strict=True):
            own = minimum + spare * table.num_rows * table.row_bytes // total
            sets = min(sets_for(table.num_rows), sets_in(own, table.row_bytes))
            places.append(RowPlaces(0, sets, table.row_bytes))
        return places

    def _host(self, file: TableFile, wanted: RowPlaces) -> HostedTable:
        extent = self._extents.allocate(wanted.num_bytes)
        assert extent is not None, "the shares fit, and nothing else is allocated here"
        where = Extent(self._begin + extent.offset, extent.num_bytes)
        self._arena.writable(where).release()  # voids what earlier daemons' workers read there
        places = RowPlaces(where.offset, wanted.num_sets, wanted.row_bytes)
        table = HostedTable(file, self._arena.memory.view, places)
        self._taken[table] = extent
        return table

    def _forget(self, table: HostedTable) -> None:
        extent = self._taken.pop(table, None)
        if extent is not None:
            table.slots.forget()
            self._extents.free(extent)


def room_for(asked: int | None, ram_bytes: int, manifests: Sequence[Manifest]) -> int:
    """How much of a budget of ``ram_bytes`` is for rows, in whole pages.

    What is ``asked`` for. Or what the experts of ``manifests`` leave, at least an eighth, and never
    more than their tables take, nor less than one token reads.
    """
    if asked is not None:
        return min(asked, ram_bytes) // PAGE_BYTES * PAGE_BYTES
    tables = [table for manifest in manifests for table in manifest.tables]
    experts = sum(manifest.expert_bytes for manifest in manifests)
    share = max(ram_bytes - experts, ram_bytes // _SHARE)
    most = sum(_needed(table, table.num_rows) for table in tables)
    least = sum(_needed(table, table.rows_per_token) for table in tables)
    return max(least, min(most, share)) // PAGE_BYTES * PAGE_BYTES


def _needed(table: Table, num_rows: int) -> int:
    """Bytes of the arena that :func:`~.sets_in` makes enough sets for so many rows of."""
    sets = sets_for(min(table.num_rows, num_rows))
    return RowPlaces(0, sets, table.row_bytes).num_bytes + 2 * PAGE_BYTES
