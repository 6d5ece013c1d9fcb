"""Memory that one step of a packing leaves to the next."""

import torch
from torch import Tensor


class Scratch:
    """Buffers, taken during a step and given back all at once.

    A page that the system has not given before costs more than reading into it does: a fresh
    buffer for each expert would take longer than its quantizing.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []
        self._taken: list[Tensor] = []

    def take(self, num_bytes: int) -> Tensor:
        """``num_bytes`` of whatever was there before (uint8, flat)."""
        fitting = [buffer for buffer in self._free if buffer.numel() >= num_bytes]
        if fitting:
            buffer = min(fitting, key=Tensor.numel)
            self._free = [other for other in self._free if other is not buffer]
        else:
            if self._free:  # one that is too small goes, so that their number does not grow
                del self._free[0]
            buffer = torch.empty(num_bytes, dtype=torch.uint8)
        self._taken.append(buffer)
        return buffer[:num_bytes]

    def reset(self) -> None:
        """Takes everything back: what was made of it may be overwritten from now on."""
        self._free += self._taken
        self._taken = []
