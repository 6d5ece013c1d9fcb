"""The keys and values of all layers, in blocks of tokens that sequences own.

Which sequence owns which block is for others to know; here is only the memory.
"""

import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from expertd_inference.kernels.blocks import BLOCK_TOKENS
from expertstore.closing import Closing
from expertstore.errors import CapacityError, InvalidInputError
from expertstore.sizes import format_bytes

_MAP_NORESERVE = 0x4000  # Linux's; mmap has the name from Python 3.13 on
_HUGE_PAGE_BYTES = 2 << 20


_CPU = torch.device("cpu")


@dataclass(frozen=True, slots=True)
class KvLayer:
    """One layer's form: so many heads of keys and values, how many numbers each has, and where."""

    num_heads: int
    key_width: int
    value_width: int
    device: torch.device = _CPU


class KvMemory(Closing):
    """``num_blocks`` blocks of :data:`.BLOCK_TOKENS` tokens of each layer.

    On the CPU it is one anonymous mapping. A page takes memory from the first time it is written
    to until :meth:`close`. What a block holds at first is not defined.

    Raises InvalidInputError for a size below 1, and CapacityError where there is no such memory.
    """

    keys: list[Tensor]
    """Of a layer: [num_blocks, num_heads, BLOCK_TOKENS, key_width], without gaps; in which order,
    :mod:`..kernels.block_order` says."""
    values: list[Tensor]
    """The same of values: [num_blocks, num_heads, BLOCK_TOKENS, value_width]."""

    def __init__(
        self,
        layers: Sequence[KvLayer],
        num_blocks: int,
        dtype: torch.dtype,
    ) -> None:
        for layer in layers:
            if min(layer.num_heads, layer.key_width, layer.value_width) < 1:
                raise InvalidInputError(f"{layer} has keys or values of no size.")
        if num_blocks < 1:
            raise InvalidInputError(
                f"{num_blocks} blocks of keys and values hold no token; ask for 1 or more."
            )
        self.num_blocks = num_blocks
        self.num_bytes = num_blocks * bytes_per_block(layers, dtype)
        self._mapping: mmap.mmap | None = None
        shapes = [
            (num_blocks, layer.num_heads, BLOCK_TOKENS, width)
            for layer in layers
            for width in (layer.key_width, layer.value_width)
        ]
        devices = [layer.device for layer in layers for _ in range(2)]
        try:
            if all(device.type == "cpu" for device in devices):
                tensors = self._map(shapes, dtype)
            else:
                tensors = [
                    # What nobody has written is read and left out, which NaN would not be.
                    torch.zeros(shape, dtype=dtype, device=device)
                    for shape, device in zip(shapes, devices, strict=True)
                ]
        except (OSError, OverflowError, torch.OutOfMemoryError) as error:
            raise CapacityError(
                f"There is no memory for {num_blocks} blocks of keys and values, "
                f"{format_bytes(self.num_bytes)}; ask for fewer.",
                requested=self.num_bytes,
                available=0,
                unit="bytes",
            ) from error
        self.keys, self.values = tensors[::2], tensors[1::2]

    def copy_block(self, source: int, target: int) -> None:
        """Gives block ``target`` what block ``source`` has, of all layers."""
        for tensor in (*self.keys, *self.values):
            tensor[target].copy_(tensor[source])

    def close(self) -> None:
        """Gives the memory back, also under tensors that are still there. Twice is harmless."""
        self.keys, self.values = [], []
        if self._mapping is not None:
            self._mapping.madvise(mmap.MADV_DONTNEED)
            self._mapping = None

    def _map(self, shapes: Sequence[tuple[int, ...]], dtype: torch.dtype) -> list[Tensor]:
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
        sizes = [math.prod(shape) for shape in shapes]
        self._mapping = mmap.mmap(-1, max(sum(sizes) * dtype.itemsize, 1), flags=flags)
        if self.num_bytes >= _HUGE_PAGE_BYTES * len(shapes):
            self._mapping.madvise(mmap.MADV_HUGEPAGE)
        tensors, start = [], 0
        for shape, size in zip(shapes, sizes, strict=True):
            flat = torch.frombuffer(self._mapping, dtype=dtype, count=size, offset=start)
            tensors.append(flat.view(shape))
            start += size * dtype.itemsize
        return tensors


def bytes_per_block(layers: Sequence[KvLayer], dtype: torch.dtype) -> int:
    """Bytes of one block, of all layers."""
    numbers = sum(layer.num_heads * (layer.key_width + layer.value_width) for layer in layers)
    return int(numbers * BLOCK_TOKENS * dtype.itemsize)
