"""The codec: its bytes are HQQ's own, and decoding undoes encoding."""

import math

import msgspec
import pytest
import torch
from hqq.core.bitpack import BitPack
from hypothesis import given
from hypothesis import strategies as st
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from expertd_testing.forms import form, random_parts
from expertstore.pack.codec import decode, dequantize, encode, record_parts
from expertstore.pack.layout import ROWS_PER_BYTE, Encoding, Matrix, record_layout


def integers(bits: int, rows: int, columns: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1 << bits, (rows, columns), generator=generator, dtype=torch.uint8)


@given(
    bits=st.sampled_from([2, 3, 4, 8]),
    blocks=st.integers(1, 9),
    columns=st.integers(1, 70),
    seed=st.integers(0, 1000),
)
def test_decoding_undoes_encoding(bits: int, blocks: int, columns: int, seed: int) -> None:
    q = integers(bits, blocks * ROWS_PER_BYTE[bits], columns, seed)
    packed = encode(q, bits)
    assert packed.dtype == torch.uint8
    assert packed.numel() * 8 == q.numel() * bits
    assert torch.equal(decode(packed, bits), q)


@pytest.mark.parametrize(
    ("bits", "pack"),
    [(8, BitPack.pack_8bit_u8), (4, BitPack.pack_4bit_u8), (2, BitPack.pack_2bit_u8)],
)
@pytest.mark.parametrize("rows", [8, 24, 256])
def test_bytes_are_hqqs(bits: int, pack: object, rows: int) -> None:
    assert callable(pack)
    q = integers(bits, rows, 48, seed=rows)
    # HQQ packs the matrix as rows of one group; the bytes are the same.
    assert torch.equal(encode(q, bits).view(-1), pack(q.view(-1, 16)).view(-1))
    assert torch.equal(encode(q, bits), pack(q))


def test_three_bits_are_two_planes() -> None:
    q = integers(3, 32, 5, seed=0)
    packed = encode(q, 3)
    assert torch.equal(packed[:8], BitPack.pack_2bit_u8(q & 3))
    assert torch.equal(packed[8:], BitPack.pack_1bit_u8(q >> 2))


def test_a_byte_holds_gate_and_up() -> None:
    gate, up = torch.full((4, 8), 0xA), torch.full((4, 8), 0x5)
    assert torch.all(encode(torch.cat((gate, up)).to(torch.uint8), 4) == 0xA5)


@pytest.mark.parametrize(("bits", "rows"), [(4, 3), (2, 6), (3, 12), (5, 8)])
def test_rows_that_do_not_fill_bytes_are_refused(bits: int, rows: int) -> None:
    with pytest.raises(ValueError, match=f"{rows} rows cannot be written in {bits} bits"):
        encode(torch.zeros(rows, 4, dtype=torch.uint8), bits)


def test_dequantize_by_hand() -> None:
    """Two groups per row, worked out on paper."""
    matrix = Matrix(
        name="m", encoding=Encoding.HQQ, out_features=2, in_features=4, bits=4, group_size=2
    )
    parts = {
        "m.q": encode(torch.tensor([[0, 1, 2, 3], [15, 14, 13, 12]], dtype=torch.uint8), 4),
        "m.scale": torch.tensor([[0.5, 1.0], [2.0, 4.0]], dtype=torch.float16),
        "m.zero": torch.tensor([[1.0, 2.0], [10.0, 12.5]], dtype=torch.float16),
    }
    expected = torch.tensor([[-0.5, 0.0, 0.0, 1.0], [10.0, 8.0, 2.0, -2.0]])
    assert torch.equal(dequantize(matrix, parts, torch.float32), expected)
    assert dequantize(matrix, parts, torch.bfloat16).dtype == torch.bfloat16


def test_dequantize_with_meta_groups_by_hand() -> None:
    """Groups of two scales: (q - zero) * scale gives 0.5 and 1.0, then 2.0 and 4.0."""
    matrix = Matrix(
        name="m", encoding=Encoding.HQQ, out_features=2, in_features=4, bits=8, group_size=2,
        meta_group_size=2,
    )  # fmt: skip
    half = torch.float16
    parts = {
        "m.q": torch.ones(2, 4, dtype=torch.uint8),
        "m.scale.q": torch.tensor([[1, 2], [1, 2]], dtype=torch.uint8),
        "m.scale.scale": torch.tensor([0.5, 2.0], dtype=half),
        "m.scale.zero": torch.tensor([0.0, 0.0], dtype=half),
        "m.zero.q": torch.tensor([[3, 3], [7, 7]], dtype=torch.uint8),
        "m.zero.scale": torch.tensor([1.0, 1.0], dtype=half),
        "m.zero.zero": torch.tensor([3.0, 6.0], dtype=half),
    }
    expected = torch.tensor([[0.5, 0.5, 1.0, 1.0], [0.0] * 4])
    assert torch.equal(dequantize(matrix, parts, torch.float32), expected)


def mxfp4(rows: int, columns: int) -> Matrix:
    return Matrix(
        name="m",
        encoding=Encoding.MXFP4,
        out_features=rows,
        in_features=columns,
        bits=4,
        group_size=32,
    )


def test_mxfp4_by_hand() -> None:
    """All sixteen values, in a row times 2 and in one times 1/4."""
    nibbles = torch.arange(32, dtype=torch.uint8) % 16
    parts = {
        "m.q": encode(torch.stack((nibbles, nibbles)), 4),
        "m.scale": torch.tensor([[128], [125]], dtype=torch.uint8),
    }
    magnitudes = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
    values = torch.tensor([*magnitudes, *(-value for value in magnitudes)] * 2)
    expected = torch.stack((values * 2, values / 4))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):  # exact in each
        assert torch.equal(dequantize(mxfp4(2, 32), parts, dtype), expected.to(dtype))


def test_mxfp4_is_transformers() -> None:
    """Every scale but the one that is not a number, with every nibble."""
    rows, columns = 510, 64
    scales = torch.arange(rows * 2).remainder(255).to(torch.uint8).view(rows, 2)
    nibbles = torch.arange(rows * columns).remainder(16).to(torch.uint8).view(rows, columns)
    blocks = (nibbles[:, ::2] | nibbles[:, 1::2] << 4).view(1, rows, 2, 16)
    theirs = convert_moe_packed_tensors(blocks, scales[None])[0].T
    ours = dequantize(
        mxfp4(rows, columns), {"m.q": encode(nibbles, 4), "m.scale": scales}, torch.bfloat16
    )
    assert torch.equal(ours.view(torch.int16), theirs.contiguous().view(torch.int16))


def by_hand(code: int, exponent_bits: int, mantissa_bits: int, bias: int) -> float:
    """A small float's value, as OCP's document words it; no infinities."""
    sign = -1.0 if code >> exponent_bits + mantissa_bits else 1.0
    exponent = code >> mantissa_bits & (1 << exponent_bits) - 1
    mantissa = code & (1 << mantissa_bits) - 1
    fraction = mantissa / (1 << mantissa_bits)
    if exponent == 0:
        return sign * fraction * 2.0 ** (1 - bias)
    if (exponent_bits, exponent, mantissa) == (4, 15, 7):
        return math.nan
    return sign * (1 + fraction) * 2.0 ** (exponent - bias)


def same_bits(ours: torch.Tensor, expected: torch.Tensor) -> bool:
    """NaN is NaN; zeros have signs."""
    nan = torch.isnan(expected)
    alike = ours.view(torch.int32) == expected.view(torch.int32)
    return bool((alike | nan).all()) and torch.equal(torch.isnan(ours), nan)


E4M3 = torch.tensor([by_hand(code, 4, 3, 7) for code in range(256)])


def test_nvfp4_by_hand() -> None:
    """Every nibble with every scale, the upper half of rows with another global scale."""
    matrix = form(Encoding.NVFP4, 256, 32)
    nibbles = torch.arange(16, dtype=torch.uint8).repeat(256, 2)
    scale = torch.arange(512).remainder(256).to(torch.uint8).view(256, 2)
    own = torch.tensor([0.1, 3e-5]).repeat_interleave(128)
    parts = {"down.q": encode(nibbles, 4), "down.scale": scale, "down.global": own}
    values = torch.tensor([by_hand(code, 2, 1, 1) for code in range(16)]).repeat(256, 2)
    scales = (E4M3[scale.int()] * own.view(-1, 1)).repeat_interleave(16, 1)
    assert same_bits(dequantize(matrix, parts, torch.float32), values * scales)


def test_fp8_by_hand() -> None:
    """Every code; blocks of 100 x 5 weights of 256 x 12, those at the edges smaller."""
    matrix = form(Encoding.FP8, 256, 12, group_size=5, group_rows=100)
    codes = torch.arange(256, dtype=torch.uint8).view(-1, 1).repeat(1, 12)
    scale = torch.tensor([[0.5, 3.0, 0.1], [1e-3, 2.0, 7.0], [1.5, 1e3, 0.3]])
    expected = E4M3.view(-1, 1).repeat(1, 12)
    for row in range(256):
        for column in range(12):
            expected[row, column] *= scale[row // 100, column // 5]
    parts = {"down.q": codes, "down.scale": scale}
    assert same_bits(dequantize(matrix, parts, torch.float32), expected)


def test_mxfp8_by_hand() -> None:
    """Every code with every scale: powers of two that float32 holds are exact."""
    matrix = form(Encoding.MXFP8, 256, 256)
    codes = torch.arange(256, dtype=torch.uint8).repeat(256, 1)
    scale = torch.arange(256, dtype=torch.uint8).view(-1, 1).repeat(1, 8)
    powers = torch.tensor([2.0 ** (code - 127) for code in range(255)] + [math.nan])
    parts = {"down.q": codes, "down.scale": scale}
    expected = (E4M3.double() * powers.double().view(-1, 1)).float()
    assert same_bits(dequantize(matrix, parts, torch.float32), expected)


@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_int_is_hqq_with_one_zero(bits: int) -> None:
    generator = torch.Generator().manual_seed(bits)
    matrix = form(Encoding.INT, 64, 128, bits=bits)
    parts = random_parts(matrix, generator, "BF16")
    zero = torch.full((64, 4), 2.0 ** (bits - 1), dtype=torch.float16)
    hqq = msgspec.structs.replace(matrix, encoding=Encoding.HQQ)
    weights = dequantize(matrix, parts, torch.float32)
    assert torch.equal(weights, dequantize(hqq, parts | {"down.zero": zero}, torch.float32))
    assert len(set(weights.flatten().tolist())) > 1 << bits - 1


def test_parts_are_views_of_the_record() -> None:
    plain = Matrix(name="down", encoding=Encoding.PLAIN, out_features=3, in_features=5)
    layout = record_layout((plain,), "BF16", has_bias=True)
    record = bytearray(layout.record_bytes)
    record_parts(record, layout)["down.bias"].fill_(1)
    assert record[layout.part("down.bias").offset :][:6] == b"\x80\x3f" * 3
    assert record_parts(record, layout)["down.weight"].shape == (3, 5)
