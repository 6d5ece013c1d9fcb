"""The stock way to have more model than RAM: the pack's files mapped, and pages read when touched.

For the same kernels and trunk as a daemon's worker, so that only the loading differs.
"""

import ctypes
import mmap
import os
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from expertstore.pack.layout import PAGE_BYTES
from expertstore.pack.manifest import Manifest

_PROT_READ, _MAP_SHARED, _MAP_FIXED = 1, 1, 16
_MADV_WILLNEED = 3
_NOWHERE = ctypes.c_void_p(-1).value


class MappedLease:
    """Records where they lie in the mapped files: nothing is held, and nothing can be lost."""

    def __init__(self, experts: Sequence[int], offsets: Sequence[int]) -> None:
        self.experts, self.offsets = tuple(experts), tuple(offsets)

    def __enter__(self) -> None:
        """Nothing is to be done."""

    def __exit__(self, *_: object) -> None:
        """Nothing either."""

    def release(self) -> None:
        """Nor here."""


class MappedSource:
    """The experts' files, mapped one behind the other; pages are read when they are touched."""

    connected = True

    def __init__(self, pack: Path, manifest: Manifest) -> None:
        self.announces = False
        """Whether a layer's records are announced (MADV_WILLNEED) before it computes."""
        names = [file.name for file in manifest.files]
        sizes = [-(-(pack / name).stat().st_size // PAGE_BYTES) * PAGE_BYTES for name in names]
        starts = np.cumsum([0, *sizes]).tolist()
        self.arena_bytes = self.mapped_bytes = starts[-1]
        self._room = mmap.mmap(-1, self.arena_bytes, prot=mmap.PROT_READ)  # addresses, no memory
        self._libc = ctypes.CDLL(None, use_errno=True)
        # Python tells no address of a mapping that cannot be written; a view of it does.
        self.arena_address = np.frombuffer(self._room, np.uint8).ctypes.data
        for name, start, size in zip(names, starts, sizes, strict=False):
            self._map(pack / name, start, size)
        self._offsets = {
            layer.layer: [
                starts[file] + offset
                for file, offset in zip(layer.files, layer.offsets, strict=True)
            ]
            for layer in manifest.layers
        }
        self._record_bytes = {
            layer.layer: manifest.layouts[layer.layout].record_bytes for layer in manifest.layers
        }

    def waves(self, layer: int, experts: Sequence[int]) -> Iterator[MappedLease]:
        """All at once."""
        offsets = [self._offsets[layer][expert] for expert in experts]
        if self.announces:
            size = self._record_bytes[layer]
            for offset in offsets:
                where = ctypes.c_void_p(self.arena_address + offset)
                self._libc.madvise(where, ctypes.c_size_t(size), _MADV_WILLNEED)
        yield MappedLease(experts, offsets)

    def touch(self, layer: int, experts: Sequence[int]) -> None:
        """Has all pages of these records read, as computing with them would."""
        for lease in self.waves(layer, experts):
            for offset in lease.offsets:
                record = (ctypes.c_uint8 * self._record_bytes[layer]).from_address(
                    self.arena_address + offset
                )
                np.frombuffer(record, np.uint8)[::PAGE_BYTES].max()

    def reattach(self, timeout_seconds: float) -> None:
        """There is nothing to attach to."""

    def _map(self, path: Path, start: int, size: int) -> None:
        fd = os.open(path, os.O_RDONLY)
        self._libc.mmap.restype = ctypes.c_void_p
        where = self._libc.mmap(
            ctypes.c_void_p(self.arena_address + start),
            ctypes.c_size_t(size),
            _PROT_READ,
            _MAP_SHARED | _MAP_FIXED,
            fd,
            ctypes.c_long(0),
        )
        os.close(fd)
        if where == _NOWHERE:
            raise OSError(ctypes.get_errno(), f"{path} cannot be mapped")
