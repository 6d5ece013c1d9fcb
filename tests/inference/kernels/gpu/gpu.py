"""Where the tests of Triton kernels run: on a GPU, or in Triton's interpreter where none is.

The interpreter has to be chosen before anything imports Triton: ``tests/inference/conftest.py``.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@dataclass(frozen=True)
class HostMemory:
    """``tensor``: uint8, in host memory; ``address``: where the device reads it."""

    tensor: Tensor
    address: int


def host_memory(num_bytes: int) -> HostMemory:
    """Zeros that the device can read: with unified addressing, pinned memory at its own address."""
    tensor = torch.zeros(num_bytes, dtype=torch.uint8, pin_memory=DEVICE == "cuda")
    return HostMemory(tensor, tensor.data_ptr())
