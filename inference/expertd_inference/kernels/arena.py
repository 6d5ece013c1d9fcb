"""The arena as torch sees it: tensors that lie in the shared mapping, without a copy."""

import ctypes

import torch
from torch import Tensor

from expertstore.pack.codec import TORCH_DTYPES
from expertstore.pack.layout import Part


class ArenaTensors:
    """The read-only mapping at ``address`` of this process, ``num_bytes`` long.

    torch knows no read-only tensor: whoever writes to one of these dies by SIGSEGV. They are
    valid only while their lease is held and until the session attaches again.
    """

    def __init__(self, address: int, num_bytes: int) -> None:
        self.address = address
        self.num_bytes = num_bytes
        # The mapping is a whole number of pages, so every dtype divides it.
        memory = (ctypes.c_uint8 * num_bytes).from_address(address)
        everything = torch.frombuffer(memory, dtype=torch.uint8)
        self._views = {name: everything.view(dtype) for name, dtype in TORCH_DTYPES.items()}

    def part(self, record: int, part: Part) -> Tensor:
        """``part`` of the record at byte offset ``record``, of the part's shape and dtype."""
        view = self._views[part.dtype]
        # One as_strided costs a third of slice, view and reshape; a layer makes dozens of them.
        strides = [1]
        for length in part.shape[:0:-1]:
            strides.insert(0, strides[0] * length)
        return view.as_strided(part.shape, strides, (record + part.offset) // view.itemsize)
