import msgspec
import pytest
import torch

from expertstore.pack.rows import decode_rows, encode_rows
from expertstore.pack.table import (
    Table,
    TableEncoding,
    block_checksum,
    block_shape,
    check_table,
    is_sound,
    row_bytes,
)

TABLE = Table(
    name="t.weight",
    file="table-00000.safetensors",
    num_bytes=4096 + 9 * 4096,
    offset=4096,
    num_rows=100,
    num_columns=160,
    rows_per_token=16,
    dtype="BF16",
    encoding=TableEncoding.PLAIN,
    block_bytes=4096,
    rows_per_block=12,
)


@pytest.mark.parametrize(
    ("num_bytes", "block"),
    [
        (90, (4096, 45)),  # 160 values in 4 bits
        (320, (4096, 12)),  # and in 16
        (2048, (8192, 3)),  # one to a page would waste half of the disk
        (21504, (24576, 1)),  # Gemma's, which are longer than a page
    ],
)
def test_blocks_are_small_and_full(num_bytes: int, block: tuple[int, int]) -> None:
    assert block_shape(num_bytes) == block


def test_a_block_knows_its_place() -> None:
    block = bytearray(4096)
    block[:3] = b"abc"
    view = memoryview(block)
    view[-8:] = block_checksum(view, 7).to_bytes(8, "little")
    assert is_sound(view, 7)
    assert not is_sound(view, 8), "another block's bytes"
    block[1] ^= 1
    assert not is_sound(view, 7)


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"dtype": "F8"}, "unknown type"),
        ({"block_bytes": 4000}, "whole pages"),
        ({"rows_per_block": 13}, "do not fit"),
        ({"num_rows": 109}, "past its file"),
        ({"num_columns": 161, "encoding": TableEncoding.INT4}, "need pairs"),
    ],
)
def test_sizes_that_contradict_each_other(changes: dict[str, object], reason: str) -> None:
    check_table(TABLE)
    with pytest.raises(ValueError, match=reason):
        check_table(msgspec.structs.replace(TABLE, **changes))


@pytest.mark.parametrize("columns", [64, 20])
@pytest.mark.parametrize(
    ("encoding", "error"),
    [
        (TableEncoding.PLAIN, 0.0),
        # Half a step of the largest of a group, the scale's rounding, and bfloat16's.
        (TableEncoding.INT8, 0.5 / 127 + 2**-8),
        (TableEncoding.INT4, 0.5 / 7 + 2**-8),
    ],
)
def test_rows_come_back(encoding: TableEncoding, error: float, columns: int) -> None:
    values = torch.randn(50, columns, generator=torch.Generator().manual_seed(0)).bfloat16()
    values[3] = 0
    stored = encode_rows(values, encoding, "BF16")
    assert stored.shape == (50, row_bytes(columns, encoding, "BF16"))
    back = decode_rows(stored, columns, encoding, "BF16")
    assert back.dtype == torch.bfloat16
    assert not back[3].any()
    difference = (back.float() - values.float()).abs().amax(1)
    assert (difference <= error * values.float().abs().amax(1) + 1e-6).all()
