"""Reading a table's file: the blocks of some rows, each read once and verified."""

import mmap
import os
import threading
from pathlib import Path

import numpy as np

from expertd.disk.record_file import RecordFile
from expertd.tables.row_slots import RowBytes, Rows
from expertstore.errors import PackError, RecordLostError
from expertstore.pack.table import Table, is_sound


class TableFile:
    """One table's file, past the page cache where the file system can: the arena is the cache."""

    def __init__(self, pack: Path, table: Table) -> None:
        """Raises :class:`PackError` if the file cannot be opened, or is shorter than its rows."""
        self.table = table
        self._file = RecordFile(pack / table.file, direct=True)
        size = os.fstat(self._file.fd).st_size
        if size < table.num_bytes:
            self._file.close()
            raise PackError(
                f"{pack / table.file} has {size} of {table.num_bytes} bytes, which the "
                f"{table.num_rows} rows of {table.name} take; copy or make the pack again."
            )
        self._local = threading.local()

    def __repr__(self) -> str:
        return f"TableFile({self._file.path}, {self.table.num_rows} rows)"

    def read(self, blocks: Rows) -> RowBytes:
        """The rows of some blocks ``[n, rows_per_block, row_bytes]``; any thread may ask.

        Raises :class:`RecordLostError`.
        """
        table = self.table
        size = table.block_bytes
        buffer = self._buffer()
        rows = np.frombuffer(buffer, np.uint8)[: table.rows_per_block * table.row_bytes]
        out = np.empty((len(blocks), len(rows)), np.uint8)
        for index, block in enumerate(blocks.tolist()):
            try:
                self._file.read_into(buffer, table.offset + block * size)
            except EOFError:
                raise self._lost(block, "its file ends before them") from None
            except OSError as error:
                raise self._lost(block, str(error.strerror)) from error
            if not is_sound(buffer, block):
                raise self._lost(block, "their checksum is wrong")
            out[index] = rows
        return out.reshape(len(blocks), table.rows_per_block, table.row_bytes)

    def close(self) -> None:
        """Closes the file; twice is harmless."""
        self._file.close()

    def _buffer(self) -> memoryview:
        """One of this thread's own, on a page, as reads past the page cache want it."""
        found: memoryview | None = getattr(self._local, "buffer", None)
        if found is None:
            found = self._local.buffer = memoryview(mmap.mmap(-1, self.table.block_bytes))
        return found

    def _lost(self, block: int, reason: str) -> RecordLostError:
        first = block * self.table.rows_per_block
        last = min(first + self.table.rows_per_block, self.table.num_rows) - 1
        return RecordLostError(
            f"Rows {first} to {last} of {self.table.name} in {self._file.path} are lost: "
            f"{reason}; copy or make the pack again.",
            experts=(),
        )
