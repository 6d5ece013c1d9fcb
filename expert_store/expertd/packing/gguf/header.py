"""What a GGUF file says of itself: its metadata, and where its tensors are.

Every count and offset is held against the file's size before anything is made of it, so a file that
is cut off or made to harm costs a sentence and no memory. Names and sizes of types come from the
``gguf`` package, whose own reader maps the file and believes it.
"""

import math
import os
import struct
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG
from typing import Any, BinaryIO

import numpy as np
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType, GGUFValueType

from expertstore.errors import CheckpointError

MAGIC = b"GGUF"
VERSIONS = (2, 3)
MAX_HEADER_BYTES = 256 << 20
"""The largest vocabularies with their merges take a tenth of it."""
MAX_TENSORS = 1 << 20
MAX_DIMENSIONS = 4
_ALIGNMENT_KEY = "general.alignment"
_DEFAULT_ALIGNMENT = 32
_MAX_ALIGNMENT = 1 << 20
_LEAST_TENSOR_BYTES = 8 + 4 + 8 + 4 + 8
"""Of an entry of the table: an empty name, one dimension, type and offset."""

_NUMBERS: dict[GGUFValueType, np.dtype[Any]] = {
    GGUFValueType.UINT8: np.dtype("<u1"),
    GGUFValueType.INT8: np.dtype("<i1"),
    GGUFValueType.UINT16: np.dtype("<u2"),
    GGUFValueType.INT16: np.dtype("<i2"),
    GGUFValueType.UINT32: np.dtype("<u4"),
    GGUFValueType.INT32: np.dtype("<i4"),
    GGUFValueType.FLOAT32: np.dtype("<f4"),
    GGUFValueType.BOOL: np.dtype("?"),
    GGUFValueType.UINT64: np.dtype("<u8"),
    GGUFValueType.INT64: np.dtype("<i8"),
    GGUFValueType.FLOAT64: np.dtype("<f8"),
}

Value = int | float | bool | str | list[int] | list[float] | list[bool] | list[str]


@dataclass(frozen=True)
class GgufTensor:
    """A tensor of a file: ``shape`` as torch has it, [..., out, in], and its bytes' place."""

    name: str
    shape: tuple[int, ...]
    type: GGMLQuantizationType
    file: Path
    offset: int
    """From the beginning of the file."""

    @property
    def num_bytes(self) -> int:
        """Of all its blocks."""
        block_size, block_bytes = GGML_QUANT_SIZES[self.type]
        return math.prod(self.shape) // block_size * block_bytes


@dataclass(frozen=True)
class GgufHeader:
    """All but the weights; both by name."""

    metadata: dict[str, Value]
    tensors: dict[str, GgufTensor]


def read_header(file: Path) -> GgufHeader:
    """Reads one file. Raises :class:`CheckpointError` if it is no whole GGUF file."""
    try:
        with file.open("rb") as opened:
            stat = os.fstat(opened.fileno())
            if not S_ISREG(stat.st_mode):
                raise CheckpointError(f"{file} is not a regular file; give the GGUF file.")
            return _Reader(file, opened, stat.st_size).read()
    except _BrokenError as error:
        raise CheckpointError(f"{file} cannot be used: {error}; download it again.") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error


class _BrokenError(Exception):
    """Why a file is not what it should be; a clause."""


class _Reader:
    """Reads a header from its beginning; nothing past :data:`MAX_HEADER_BYTES`."""

    def __init__(self, file: Path, opened: BinaryIO, num_bytes: int) -> None:
        self._file = file
        self._opened = opened
        self._num_bytes = num_bytes
        self._offset = 0

    def read(self) -> GgufHeader:
        if self._num_bytes < 4 or self._take(4) != MAGIC:
            raise _BrokenError("it does not begin as GGUF files do")
        version = self._number("<I")
        if version not in VERSIONS and version & 0xFFFF == 0:
            raise _BrokenError("it was written for machines of the other byte order")
        if version not in VERSIONS:
            raise _BrokenError(f"it has GGUF's version {version}, and known are 2 and 3")
        num_tensors, num_values = self._number("<Q"), self._number("<Q")
        if num_tensors > MAX_TENSORS or num_tensors * _LEAST_TENSOR_BYTES > self._left:
            raise _BrokenError(f"it claims {num_tensors} tensors, more than it has room for")
        if num_values * 13 > self._left:
            raise _BrokenError(f"it claims {num_values} values, more than it has room for")
        metadata: dict[str, Value] = {}
        for _ in range(num_values):
            key = self._text()
            if key in metadata:
                raise _BrokenError(f"it has {key[:64]} twice")
            metadata[key] = self._value(key)
        entries = [self._entry() for _ in range(num_tensors)]
        return GgufHeader(metadata, self._place(entries, _alignment(metadata)))

    @property
    def _left(self) -> int:
        return min(self._num_bytes, MAX_HEADER_BYTES) - self._offset

    def _take(self, count: int) -> bytes:
        if count > self._left:
            if self._num_bytes > MAX_HEADER_BYTES:
                raise _BrokenError(f"its header is larger than {MAX_HEADER_BYTES >> 20} MiB")
            raise _BrokenError(f"its header ends past its {self._num_bytes} bytes")
        data = self._opened.read(count)
        if len(data) < count:
            raise _BrokenError("it became shorter while it was read")
        self._offset += count
        return data

    def _number(self, form: str) -> int:
        return int(struct.unpack(form, self._take(struct.calcsize(form)))[0])

    def _text(self) -> str:
        try:
            return self._take(self._number("<Q")).decode()
        except UnicodeDecodeError as error:
            raise _BrokenError("a text in its header is not UTF-8") from error

    def _value(self, key: str) -> Value:
        kind = self._kind(key)
        if kind is GGUFValueType.STRING:
            return self._text()
        if kind is not GGUFValueType.ARRAY:
            return self._numbers(kind, 1)[0]
        kind, count = self._kind(key), self._number("<Q")
        if kind is GGUFValueType.ARRAY:
            raise _BrokenError(f"{key[:64]} is an array of arrays")
        if kind is not GGUFValueType.STRING:
            return self._numbers(kind, count)
        if count * 8 > self._left:
            raise _BrokenError(f"{key[:64]} claims {count} texts, more than it has room for")
        return [self._text() for _ in range(count)]

    def _kind(self, key: str) -> GGUFValueType:
        number = self._number("<I")
        try:
            return GGUFValueType(number)
        except ValueError as error:
            raise _BrokenError(f"{key[:64]} has the unknown type {number}") from error

    def _numbers(self, kind: GGUFValueType, count: int) -> list[int] | list[float] | list[bool]:
        dtype = _NUMBERS[kind]
        found = np.frombuffer(self._take(count * dtype.itemsize), np.uint8)
        if kind is GGUFValueType.BOOL:
            return [bool(byte) for byte in found]
        numbers: list[int] | list[float] = found.view(dtype).tolist()
        return numbers

    def _entry(self) -> tuple[str, tuple[int, ...], GGMLQuantizationType, int]:
        """Name, shape, type, and offset behind the header."""
        name = self._text()
        num_dimensions = self._number("<I")
        if not 1 <= num_dimensions <= MAX_DIMENSIONS:
            raise _BrokenError(f"{name[:64]} has {num_dimensions} dimensions")
        shape = tuple(self._number("<Q") for _ in range(num_dimensions))[::-1]
        number, offset = self._number("<I"), self._number("<Q")
        try:
            kind = GGMLQuantizationType(number)
        except ValueError as error:
            raise _BrokenError(f"{name[:64]} has the unknown type {number}") from error
        if not all(shape) or shape[-1] % GGML_QUANT_SIZES[kind][0]:
            raise _BrokenError(
                f"{name[:64]} in {kind.name} has the shape {list(shape)}, which is none of it"
            )
        return name, shape, kind, offset

    def _place(
        self,
        entries: list[tuple[str, tuple[int, ...], GGMLQuantizationType, int]],
        alignment: int,
    ) -> dict[str, GgufTensor]:
        """The tensors by name, none past the file's end and none on another."""
        begin = -(-self._offset // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, kind, offset in entries:
            if name in tensors:
                raise _BrokenError(f"it has the tensor {name[:64]} twice")
            tensor = GgufTensor(name, shape, kind, self._file, begin + offset)
            if offset % alignment:
                raise _BrokenError(f"{name[:64]} is not aligned to {alignment} bytes")
            if tensor.offset + tensor.num_bytes > self._num_bytes:
                raise _BrokenError(
                    f"it is cut off: {name[:64]} ends at byte {tensor.offset + tensor.num_bytes}, "
                    f"and it has {self._num_bytes}"
                )
            tensors[name] = tensor
        end = begin
        for tensor in sorted(tensors.values(), key=lambda tensor: tensor.offset):
            if tensor.offset < end:
                raise _BrokenError(f"{tensor.name[:64]} lies on another tensor")
            end = tensor.offset + tensor.num_bytes
        return tensors


def _alignment(metadata: dict[str, Value]) -> int:
    value = metadata.get(_ALIGNMENT_KEY, _DEFAULT_ALIGNMENT)
    # bool is an int.
    if type(value) is not int or not 0 < value <= _MAX_ALIGNMENT or value & (value - 1):
        raise _BrokenError(f"its alignment is {str(value)[:32]}, and must be a power of two")
    return value
