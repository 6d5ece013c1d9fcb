"""The layout of a record: what is built passes the check, what is bent does not."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd_testing.forms import form
from expertstore.pack.layout import (
    PAGE_BYTES,
    PART_ALIGNMENT,
    Encoding,
    Matrix,
    Part,
    RecordLayout,
    check_layout,
    matrix_parts,
    record_layout,
    scale_part,
)


def hqq(name: str, bits: int, rows: int, columns: int, group: int, meta: int = 0) -> Matrix:
    return Matrix(
        name=name,
        encoding=Encoding.HQQ,
        out_features=rows,
        in_features=columns,
        bits=bits,
        group_size=group,
        meta_group_size=meta,
    )


def mxfp4(name: str, **changes: int) -> Matrix:
    matrix = hqq(name, 4, 128, 64, 32)
    return msgspec.structs.replace(matrix, encoding=Encoding.MXFP4, **changes)


def kept(encoding: Encoding, **changes: int) -> Matrix:
    return msgspec.structs.replace(form(encoding, 128, 64), **changes)


def plain(name: str, rows: int, columns: int) -> Matrix:
    return Matrix(name=name, encoding=Encoding.PLAIN, out_features=rows, in_features=columns)


def test_layout_of_two_bits_with_meta_groups() -> None:
    layout = record_layout((hqq("down", 2, 128, 64, 16, 128),), "BF16", has_bias=True)
    assert [(part.name, part.shape, part.dtype) for part in layout.parts] == [
        ("down.q", (32, 64), "U8"),
        ("down.scale.q", (128, 4), "U8"),
        ("down.scale.scale", (4,), "F16"),
        ("down.scale.zero", (4,), "F16"),
        ("down.zero.q", (128, 4), "U8"),
        ("down.zero.scale", (4,), "F16"),
        ("down.zero.zero", (4,), "F16"),
        ("down.bias", (128,), "BF16"),
    ]


def test_layout_of_mxfp4() -> None:
    layout = record_layout((mxfp4("gate_up"),), "BF16", has_bias=True)
    assert [(part.name, part.shape, part.dtype) for part in layout.parts] == [
        ("gate_up.q", (64, 64), "U8"),
        ("gate_up.scale", (128, 2), "U8"),
        ("gate_up.bias", (128,), "BF16"),
    ]
    check_layout(layout)


@pytest.mark.parametrize(
    ("matrix", "parts"),
    [
        (kept(Encoding.MXFP8), [("q", (128, 64), "U8"), ("scale", (128, 2), "U8")]),
        (kept(Encoding.INT), [("q", (64, 64), "U8"), ("scale", (128, 2), "BF16")]),
        (
            kept(Encoding.NVFP4),
            [("q", (64, 64), "U8"), ("scale", (128, 4), "U8"), ("global", (128,), "F32")],
        ),
        # 130 x 72: whole blocks, and smaller ones at the right and the bottom.
        (
            kept(Encoding.FP8, out_features=130, in_features=72, group_rows=32),
            [("q", (130, 72), "U8"), ("scale", (5, 3), "F32")],
        ),
    ],
)
def test_layouts_of_forms_that_are_kept(
    matrix: Matrix, parts: list[tuple[str, tuple[int, ...], str]]
) -> None:
    layout = record_layout((matrix,), "BF16", has_bias=False, scales=["BF16"])
    found = [(part.name.removeprefix("down."), part.shape, part.dtype) for part in layout.parts]
    assert found == parts
    check_layout(layout)
    for i, part in enumerate(layout.parts):
        # Of the same size, so that the next part stays where it is.
        other = {"U8": "I8", "F32": "I32", "BF16": "I16"}[part.dtype]
        bent = msgspec.structs.replace(part, dtype=other)
        with pytest.raises(ValueError, match=f"part {part.name} (is missing|has the unknown type)"):
            check_layout(
                msgspec.structs.replace(
                    layout, parts=(*layout.parts[:i], bent, *layout.parts[i + 1 :])
                )
            )


@given(
    bits=st.sampled_from([0, 2, 3, 4, 8]),
    rows=st.integers(1, 8).map(lambda n: 8 * n),
    columns=st.integers(1, 4).map(lambda n: 64 * n),
    group=st.sampled_from([16, 32, 64]),
    has_bias=st.booleans(),
)
def test_what_is_built_passes_the_check(
    bits: int, rows: int, columns: int, group: int, has_bias: bool
) -> None:
    matrices = tuple(
        hqq(name, bits, rows, columns, group) if bits else plain(name, rows, columns)
        for name in ("gate_up", "down")
    )
    layout = record_layout(matrices, "BF16", has_bias=has_bias)
    check_layout(layout)
    assert layout.record_bytes % PAGE_BYTES == 0
    assert all(part.offset % PART_ALIGNMENT == 0 for part in layout.parts)
    weight_bytes = sum(part.num_bytes for part in layout.parts if ".q" in part.name)
    assert not bits or weight_bytes * 8 == 2 * rows * columns * bits  # 3 bit: no bit is lost


@pytest.mark.parametrize(
    ("matrix", "message"),
    [
        (hqq("down", 4, 127, 64, 64), "127 rows, and 4 bits need a multiple of 2"),
        (hqq("down", 3, 4, 64, 64), "multiple of 8"),
        (hqq("down", 4, 128, 96, 64), "group size 64 does not divide the 96 inputs of down"),
        (hqq("down", 4, 128, 64, 0), "group size 0"),
        (hqq("down", 5, 128, 64, 64), "5 bits; known are 2, 3, 4 and 8"),
        (mxfp4("down", bits=8), "down is MXFP4, which has 4 bits and groups of 32"),
        (mxfp4("down", group_size=64), "groups of 32"),
        (mxfp4("down", meta_group_size=128), "down is MXFP4, which has no meta groups"),
        (mxfp4("down", in_features=48), "group size 32 does not divide the 48 inputs"),
        (mxfp4("down", out_features=127), "127 rows, and 4 bits need a multiple of 2"),
        (kept(Encoding.NVFP4, group_size=32), "down is NVFP4, which has 4 bits and groups of 16"),
        (kept(Encoding.MXFP8, bits=4), "down is MXFP8, which has 8 bits and groups of 32"),
        (kept(Encoding.FP8, bits=4), "down is FP8 and has 4 bits"),
        (kept(Encoding.FP8, group_size=0), "group size 0 does not divide the 64 inputs"),
        (kept(Encoding.FP8, meta_group_size=128), "down is FP8, which has no meta groups"),
        (kept(Encoding.INT, meta_group_size=128), "down is INT, which has no meta groups"),
        (kept(Encoding.INT, group_rows=2), "down is INT, whose groups have one row"),
        (kept(Encoding.INT, bits=6), "6 bits; known are 2, 3, 4 and 8"),
        (kept(Encoding.INT, in_features=48), "group size 32 does not divide the 48 inputs"),
        (hqq("down", 4, 2, 64, 64, 128), "meta group size 128 does not divide the 2 groups"),
    ],
)
def test_impossible_matrices_are_refused(matrix: Matrix, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matrix_parts(matrix, "BF16")


@pytest.mark.parametrize("meta", [0, 128])
def test_scales_may_be_bfloat16_and_zeros_not(meta: int) -> None:
    matrix = hqq("down", 4, 128, 128, 16, meta)
    layout = record_layout((matrix,), "BF16", has_bias=False, scales=["BF16"])
    dtypes = {part.name: part.dtype for part in layout.parts}
    assert {name for name, dtype in dtypes.items() if dtype == "BF16"} == {scale_part(matrix)}
    usual = record_layout((matrix,), "BF16", has_bias=False)
    assert layout.record_bytes == usual.record_bytes
    check_layout(layout)
    for name, dtype in dtypes.items():
        if dtype == "F16":
            parts = tuple(
                msgspec.structs.replace(part, dtype="BF16") if part.name == name else part
                for part in layout.parts
            )
            with pytest.raises(ValueError, match=f"part {name} is missing or not of"):
                check_layout(msgspec.structs.replace(layout, parts=parts))


GOOD = record_layout((plain("down", 64, 64), plain("gate_up", 128, 64)), "BF16", has_bias=False)


def with_part(index: int, **changes: object) -> RecordLayout:
    parts = list(GOOD.parts)
    parts[index] = msgspec.structs.replace(parts[index], **changes)
    return msgspec.structs.replace(GOOD, parts=tuple(parts))


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (with_part(0, num_bytes=64), "not its shape's"),
        (with_part(0, offset=32), "misplaced"),
        (with_part(1, offset=0), "misplaced"),
        (with_part(1, offset=1 << 20), "past the record"),
        (with_part(0, dtype="F8"), "unknown type"),
        (with_part(0, name="down.q"), "down.weight is missing"),
        (with_part(0, shape=(32, 128)), "not of its matrix's shape"),
        (msgspec.structs.replace(GOOD, record_bytes=GOOD.record_bytes - 1), "4 KiB"),
        (msgspec.structs.replace(GOOD, matrices=GOOD.matrices[:1]), "belongs to no matrix"),
        (
            msgspec.structs.replace(
                GOOD,
                parts=(
                    *GOOD.parts,
                    Part(name="down.bias", offset=24576, num_bytes=2, shape=(1,), dtype="BF16"),
                ),
                record_bytes=28672,
            ),
            "down.bias is not of its matrix's shape",
        ),
    ],
)
def test_bent_layouts_fail_the_check(layout: RecordLayout, message: str) -> None:
    check_layout(GOOD)
    with pytest.raises(ValueError, match=message):
        check_layout(layout)
