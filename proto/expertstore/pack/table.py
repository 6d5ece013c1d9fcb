"""Tables of rows of which a token reads a few: per-layer embeddings, n-gram embeddings.

A table has a file of its own, ``table-00000.safetensors``, with one U8 tensor ``[blocks,
block_bytes]`` that starts on a page. A block is the least that is read and verified::

    row │ row │ ... │ zeros │ checksum

Rows do not cross blocks. The checksum is XXH3-64 of all bytes before it, seeded with the block's
number, little-endian: a block in another's place is wrong. So neither manifest nor daemon holds
anything for each row: row ``i`` is in block ``i // rows_per_block``.
"""

from enum import StrEnum
from typing import Annotated

from msgspec import Meta
from xxhash import xxh3_64_intdigest

from expertstore.pack.layout import DTYPE_BYTES, PAGE_BYTES, Bytes, Count, Struct, round_up

CHECKSUM_BYTES = 8
GROUP_SIZE = 32
"""Values of a row that share a scale, where they are quantized; a shorter row is one group."""

_MAX_WASTE = 4
"""At most one in so many bytes of a block is no row's, where blocks of some size allow that."""


class TableEncoding(StrEnum):
    """How the values of a row are written."""

    PLAIN = "plain"
    """In the table's ``dtype``."""
    INT8 = "int8"
    """Signed bytes, then an F16 scale per group."""
    INT4 = "int4"
    """Two values a byte (the first in the low half, 8 added), then an F16 scale per group."""


class Table(Struct, frozen=True):
    """One table: the parameter ``name`` of the model, ``[num_rows, num_columns]``.

    ``dtype`` is that of its values for the model, in safetensors' names. ``rows_per_token`` is how
    many of them one token reads. ``offset`` is where block 0 begins in the file.
    """

    name: str
    file: str
    num_bytes: Bytes
    offset: Bytes
    num_rows: Count
    num_columns: Count
    rows_per_token: Count
    dtype: str
    encoding: TableEncoding
    block_bytes: Count
    rows_per_block: Annotated[int, Meta(ge=1, le=1 << 16)]

    @property
    def row_bytes(self) -> int:
        """Size of one row as it is stored."""
        return row_bytes(self.num_columns, self.encoding, self.dtype)

    @property
    def num_blocks(self) -> int:
        """Blocks of the file; the last may have fewer rows."""
        return -(-self.num_rows // self.rows_per_block)


def group_size(num_columns: int) -> int:
    """Of a quantized row of so many values. Raises ValueError if there is none."""
    if num_columns % 2:
        raise ValueError(f"rows of {num_columns} values cannot be quantized, which need pairs")
    return GROUP_SIZE if num_columns % GROUP_SIZE == 0 else num_columns


def row_bytes(num_columns: int, encoding: TableEncoding, dtype: str) -> int:
    """Size of a row of so many values. Raises ValueError if it cannot be written so."""
    if encoding is TableEncoding.PLAIN:
        return num_columns * DTYPE_BYTES[dtype]
    scales = 2 * (num_columns // group_size(num_columns))
    return num_columns // (1 if encoding is TableEncoding.INT8 else 2) + scales


def block_shape(num_bytes: int) -> tuple[int, int]:
    """Size of a block for rows of ``num_bytes``, and how many of them it has.

    The smallest of which few bytes are wasted: a miss reads a whole one for a row.
    """
    least = round_up(num_bytes + CHECKSUM_BYTES, PAGE_BYTES)
    shapes = [
        (size, (size - CHECKSUM_BYTES) // num_bytes)
        for size in range(least, 4 * least + 1, PAGE_BYTES)
    ]
    for size, count in shapes:
        if (size - count * num_bytes) * _MAX_WASTE <= size:
            return size, count
    return max(shapes, key=lambda shape: shape[1] * num_bytes / shape[0])


def block_checksum(block: memoryview, number: int) -> int:
    """What the last bytes of block ``number`` have to say of those before them."""
    return xxh3_64_intdigest(block[:-CHECKSUM_BYTES], seed=number)


def is_sound(block: memoryview, number: int) -> bool:
    """Whether a block has the bytes that were packed."""
    stored = int.from_bytes(block[-CHECKSUM_BYTES:], "little")
    return stored == block_checksum(block, number)


def check_table(table: Table) -> None:
    """Raises ValueError unless sizes fit each other."""
    if table.dtype not in DTYPE_BYTES:
        raise ValueError(f"the table {table.name} has the unknown type {table.dtype}")
    size = table.row_bytes
    if table.block_bytes % PAGE_BYTES or table.offset % PAGE_BYTES:
        raise ValueError(f"the blocks of the table {table.name} are not made of whole pages")
    if table.rows_per_block * size + CHECKSUM_BYTES > table.block_bytes:
        raise ValueError(f"the rows of the table {table.name} do not fit into its blocks")
    if table.offset + table.num_blocks * table.block_bytes > table.num_bytes:
        raise ValueError(f"the table {table.name} reaches past its file")
