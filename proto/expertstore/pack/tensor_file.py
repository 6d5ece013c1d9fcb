"""safetensors files by their bytes: the header read and written, the data left alone.

The format: 8 bytes of header length (little-endian), a JSON object of tensor name to dtype,
shape and data offsets, padded with spaces, then the data of all tensors without gaps. The
``safetensors`` package maps whole files and writes them in one piece; packs are written as
a stream, on page boundaries, and read by ``pread``, whose failures are errors, not signals.
"""

import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import msgspec
from msgspec import Meta

from expertstore.pack.layout import DTYPE_BYTES, PAGE_BYTES, round_up

MAX_HEADER_BYTES = 100_000_000
"""What the safetensors package accepts."""


class TensorEntry(msgspec.Struct, frozen=True):
    """A tensor in a file; ``offset`` counts from the start of the file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int


class _Entry(msgspec.Struct):
    dtype: str
    shape: tuple[Annotated[int, Meta(ge=0, le=1 << 48)], ...]
    data_offsets: tuple[Annotated[int, Meta(ge=0)], Annotated[int, Meta(ge=0)]]


def build_header(tensors: Sequence[tuple[str, str, tuple[int, ...]]]) -> bytes:
    """The bytes before the data of a file with ``tensors``, given as name, dtype and shape.

    The data lies in the order given and starts on a page.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, dtype, shape in tensors:
        begin, end = end, end + math.prod(shape) * DTYPE_BYTES[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": (begin, end)}
    data = msgspec.json.encode(header)
    length = round_up(len(data) + 8, PAGE_BYTES) - 8
    return length.to_bytes(8, "little") + data.ljust(length)


def read_header(path: Path) -> dict[str, TensorEntry]:
    """The tensors of the file, by name, in the order of its header.

    A file shorter than its header says is not refused. Raises OSError, and ValueError if it
    is not a safetensors file.
    """
    with path.open("rb") as file:
        file_bytes = os.fstat(file.fileno()).st_size
        length = int.from_bytes(file.read(8), "little")
        if length > min(MAX_HEADER_BYTES, file_bytes - 8):
            raise ValueError("it is truncated or not a safetensors file")
        data = file.read(length)
    try:
        raw = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        raw.pop("__metadata__", None)
        entries = {name: msgspec.json.decode(entry, type=_Entry) for name, entry in raw.items()}
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"its header is damaged ({error})") from error
    tensors = {}
    for name, entry in entries.items():
        begin, end = entry.data_offsets
        size = DTYPE_BYTES.get(entry.dtype)
        if end < begin or (size is not None and math.prod(entry.shape) * size != end - begin):
            raise ValueError(f"its header is damaged (the size of {name} is not its shape's)")
        tensors[name] = TensorEntry(name, entry.dtype, entry.shape, 8 + length + begin, end - begin)
    return tensors


def read_fully(fd: int, num_bytes: int, offset: int) -> bytearray:
    """``num_bytes`` from byte ``offset``. Raises OSError; EOFError if the file ends before."""
    buffer = bytearray(num_bytes)
    read_into(fd, memoryview(buffer), offset)
    return buffer


def read_into(fd: int, view: memoryview, offset: int) -> None:
    """Fills ``view`` from byte ``offset``. Raises OSError; EOFError if the file ends before."""
    done = 0
    while done < len(view):
        count = os.preadv(fd, [view[done:]], offset + done)
        if not count:
            raise EOFError
        done += count
