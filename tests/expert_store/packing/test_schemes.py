"""Precisions are read as they are written; presets are what the paper says."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd.packing.schemes import (
    GROUP_SIZES,
    PARTS,
    PLAIN,
    SCHEMES,
    Precision,
    choose_scheme,
    parse_precision,
)
from expertstore.errors import ConfigError
from expertstore.pack.layout import Encoding


@given(
    st.builds(
        Precision,
        st.sampled_from([2, 3, 4, 8]),
        st.sampled_from(GROUP_SIZES),
        st.sampled_from([0, 128]),
    )
)
def test_what_is_printed_is_parsed(precision: Precision) -> None:
    assert parse_precision(str(precision)) == precision


def test_sixteen_bits() -> None:
    assert parse_precision("16") is PLAIN
    assert str(PLAIN) == "16"


@pytest.mark.parametrize("text", ["", "4", "g64", "5g64", "4g60", "4g64x", "-4g64", "bf16"])
def test_other_precisions_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match="is not a precision"):
        parse_precision(text)


def test_presets() -> None:
    described = {
        name: " ".join(str(getattr(scheme, part)) for part in PARTS)
        for name, scheme in SCHEMES.items()
    }
    assert described == {
        "bf16": "16 16 16 16 16",
        "8bit": "8g128 8g128 8g128 16 16",
        "4bit": "4g64 4g64 4g64 16 16",
        "4bit-fast": "4g64 4g64 4g64 8g128 16",
        "as-is": "as-is as-is as-is as-is 16",
        "paper-3bit": "3g64m 4g64m 16 16 16",
        "paper-2bit": "2g16m 4g64m 16 16 16",
    }


def test_a_part_of_a_preset_can_be_replaced() -> None:
    scheme = choose_scheme("4bit", experts="3g64", attention="16")
    assert (scheme.experts, scheme.attention) == (Precision(3, 64), PLAIN)
    assert scheme.name == "4bit experts=3g64 attention=16"
    scheme = choose_scheme("bf16", dense="4g32", head="8g128m")
    assert (scheme.dense, scheme.head) == (Precision(4, 32), Precision(8, 128, 128))
    assert scheme.name == "bf16 dense=4g32 head=8g128m"
    with pytest.raises(ConfigError, match="no scheme 'q4'; there are bf16, 8bit"):
        choose_scheme("q4")


def test_scales_stay_fp16_where_meta_groups_do_not_fit() -> None:
    precision = Precision(4, 64, 128)
    assert precision.matrix("m", 64, 128).meta_group_size == 128
    assert precision.matrix("m", 63, 128).meta_group_size == 0
    assert PLAIN.matrix("m", 63, 128).encoding is Encoding.PLAIN
