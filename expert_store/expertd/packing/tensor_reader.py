"""Bytes of a checkpoint's tensors, out of its files or of what fetches these."""

import os
from math import prod
from pathlib import Path
from threading import Lock

import numpy as np
from torch import Tensor

from expertd.packing.checkpoint_files import CheckpointTensor
from expertd.packing.scratch import Scratch
from expertd.packing.shards import Shards
from expertd.packing.stored.unpacking import READ_DTYPES
from expertstore.errors import CheckpointError
from expertstore.pack.codec import TORCH_DTYPES
from expertstore.pack.tensor_file import read_into


class TensorReader:
    """Opens files when something in them is asked for; threads may read at the same time."""

    def __init__(self, shards: Shards | None = None) -> None:
        """``shards``: its files are here only for a time; what is read of others is theirs."""
        self._shards = shards
        self._fds: dict[Path, int] = {}
        self._opening = Lock()

    def close(self) -> None:
        """Closes all files; twice is harmless."""
        while self._fds:
            os.close(self._fds.popitem()[1])

    def drop(self, file: Path) -> None:
        """Closes a file of which nothing is left to read, and says so to its :class:`Shards`."""
        fd = self._fds.pop(file, None)
        if fd is not None:
            os.close(fd)
        if self._shards is not None:
            self._shards.drop(file)

    def read(
        self,
        tensor: CheckpointTensor,
        expert: int | None,
        scratch: Scratch,
        num_rows: int | None = None,
    ) -> Tensor:
        """A tensor as the file has it; of one of all experts, the ``expert``'s.

        With ``num_rows`` its first rows.
        """
        shape = tensor.entry.shape if expert is None else tensor.entry.shape[1:]
        num_bytes = tensor.entry.num_bytes // (1 if expert is None else tensor.entry.shape[0])
        begin = 0 if expert is None else expert * num_bytes
        if num_rows is not None and shape and num_rows < shape[0]:
            num_bytes = num_bytes // shape[0] * num_rows
            shape = (num_rows, *shape[1:])
        values = self.read_bytes(tensor, begin, scratch.take(num_bytes))
        # F4 has two values a byte, which are read as bytes.
        return values.view(shape) if values.numel() == prod(shape) else values.view(shape[0], -1)

    def read_bytes(self, tensor: CheckpointTensor, begin: int, buffer: Tensor) -> Tensor:
        """``buffer`` (uint8), filled from the tensor's byte ``begin``, in its dtype."""
        dtype = {**TORCH_DTYPES, **READ_DTYPES}.get(tensor.entry.dtype)
        if dtype is None:
            raise CheckpointError(
                f"{tensor.name} in {tensor.file} has the type {tensor.entry.dtype}, which cannot "
                "be packed yet; pack a checkpoint in 16 or 32 bits."
            )
        if self._shards is not None and not self._shards.is_here(tensor.file):
            data = self._shards.read(tensor.file, tensor.entry.offset + begin, buffer.numel())
            buffer.numpy()[:] = np.frombuffer(data, np.uint8)
            return buffer.view(dtype)
        try:
            with self._opening:
                if tensor.file not in self._fds:
                    self._fds[tensor.file] = os.open(tensor.file, os.O_RDONLY | os.O_CLOEXEC)
            view = buffer.numpy().data
            read_into(self._fds[tensor.file], view, tensor.entry.offset + begin)
        except EOFError as error:
            raise CheckpointError(
                f"{tensor.file} is truncated: {tensor.name} lies past its end; download it again."
            ) from error
        except OSError as error:
            raise CheckpointError(f"{tensor.file} cannot be read: {error.strerror}.") from error
        return buffer.view(dtype)
