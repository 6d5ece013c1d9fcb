"""Sizes in bytes as people write and read them."""

import re

_PAGE_BYTES = 4096
_PREFIXES = "KMGT"
_UNITS = {
    "": 1,
    "b": 1,
    **{f"{prefix}ib": 1 << 10 * power for power, prefix in enumerate(_PREFIXES.lower(), start=1)},
    **{f"{prefix}b": 1000**power for power, prefix in enumerate(_PREFIXES.lower(), start=1)},
}


def parse_bytes(text: str) -> int:
    """``"512MiB"``, ``"1.5 GB"`` or ``"4096"`` in bytes. Raises ValueError."""
    match = re.fullmatch(r"\s*(\d{1,15}(?:\.\d{1,15})?)\s*([a-zA-Z]*)\s*", text)
    unit = _UNITS.get(match[2].lower()) if match else None
    if match is None or unit is None:
        raise ValueError(f"{text!r} is not a size; write it like 512MiB, 24GiB or 1.5GB")
    return int(float(match[1]) * unit)


def format_bytes(num_bytes: int) -> str:
    """``num_bytes`` in the largest binary unit that leaves at least 1."""
    value, unit = float(num_bytes), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if value < 1024 or unit == "TiB":
            break
        value /= 1024
    return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"


def size_to_give(num_bytes: int) -> str:
    """A size to type, as :func:`parse_bytes` reads it, of at least ``num_bytes``.

    For advice: :func:`format_bytes` rounds to the nearest, and half of what it says is too little.
    In whole pages, since that is what memory is given in.
    """
    num_bytes = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
    power = min(max(10, num_bytes.bit_length() - 1) // 10, len(_PREFIXES))
    tenths = -(-10 * num_bytes >> 10 * power)
    return f"{tenths / 10:.15g}{_PREFIXES[power - 1]}iB"
