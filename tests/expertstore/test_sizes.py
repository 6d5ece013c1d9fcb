"""Sizes as people write them."""

import random

import pytest

from expertstore.sizes import format_bytes, parse_bytes, size_to_give


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [("512MiB", 512 << 20), ("1.5 GB", 1_500_000_000), ("4096", 4096), ("24gib", 24 << 30)],
)
def test_parse(text: str, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["", "much", "1 QiB", "-5MiB", "1,5GiB", "MiB"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(ValueError, match="is not a size"):
        parse_bytes(text)


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1536, "1.5 KiB"),
        (16 << 20, "16.0 MiB"),
        (3 << 42, "12.0 TiB"),
    ],
)
def test_format(num_bytes: int, text: str) -> None:
    assert format_bytes(num_bytes) == text


@pytest.mark.parametrize(
    ("num_bytes", "text"),
    [
        (1, "4KiB"),
        (917504, "896KiB"),
        (64 << 20, "64MiB"),
        ((24 << 30) + (300 << 20), "24.3GiB"),
        ((24 << 30) + 1, "24.1GiB"),
        ((1 << 20) - 1, "1MiB"),
        (3 << 52, "12288TiB"),
    ],
)
def test_a_size_to_give(num_bytes: int, text: str) -> None:
    assert size_to_give(num_bytes) == text
    assert parse_bytes(text) >= num_bytes


def test_a_size_to_give_is_enough() -> None:
    draw = random.Random(0)
    for _ in range(2000):
        num_bytes = draw.randrange(1, 1 << draw.randrange(1, 46))
        given = parse_bytes(size_to_give(num_bytes))
        assert num_bytes <= given - given % 4096, (num_bytes, size_to_give(num_bytes))
        assert given <= max(4096, 1.1 * num_bytes + 4096)
