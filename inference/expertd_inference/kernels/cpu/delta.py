"""The gated delta rule for one row of each sequence, on states where they lie.

torch computes it by ten operations, each of which reads and writes all states or a copy of them.
Here a state is read once and written once. The bits of a sequence depend on it alone.
"""

import ctypes
from collections.abc import Sequence

import torch
from torch import Tensor

from expertd_inference.kernels.cpu.library import TYPES, check_memory, native_library
from expertd_inference.kernels.cpu.linear import DTYPES
from expertd_inference.kernels.cpu.structures import DeltaCall

MAX_WIDTH = 512


class Places:
    """For each sequence of a step where its states are read, and where they are written."""

    def __init__(self, before: Sequence[int], after: Sequence[int]) -> None:
        self.num_sequences = len(before)
        self.most = max(*before, *after)
        self._numbers = (ctypes.c_int64 * (2 * len(before)))(*before, *after)
        self.before = ctypes.addressof(self._numbers)
        self.after = self.before + 8 * len(before)


def delta_step(
    states: Tensor,
    places: Places,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    decay: Tensor,
    beta: Tensor,
) -> Tensor:
    """Writes the sequences' new states, and gives [sequences, heads, values].

    Args:
        states: [places, heads, keys, values] float32, without gaps.
        places: Of the sequences' states; a place that is written may be the one that is read.
        query: [sequences, key_heads, keys], as is ``key``; both are brought to length 1. All but
            ``states`` and ``decay`` are bfloat16, or all float32.
        key: Each serves ``heads / key_heads`` heads.
        value: [sequences, heads, values].
        decay: [sequences, heads], or [sequences, heads, keys]: natural logarithms.
        beta: [sequences, heads].

    Raises:
        ValueError: The shapes or dtypes do not fit together.
    """
    num, key_heads, keys = key.shape
    heads, values = value.shape[1:]
    rows = (query, key, value, beta)
    if not fits(tuple(states.shape[1:]), states.dtype, value.dtype) or not states.is_contiguous():
        raise ValueError(f"states of {states.shape} {states.dtype} are not known")
    if num != places.num_sequences or places.most >= len(states):
        raise ValueError(f"{places.num_sequences} places do not fit {num} sequences")
    if any(part.dtype is not value.dtype for part in rows) or heads % key_heads:
        raise ValueError("rows of several dtypes, or of heads that do not share keys evenly")
    if not (
        states.shape[1:] == (heads, keys, values)
        and query.shape == key.shape
        and beta.shape == (num, heads)
        and decay.shape in ((num, heads), (num, heads, keys))
    ):
        raise ValueError(f"states of {states.shape} do not fit values of {value.shape}")
    held = [part.contiguous() for part in (*rows, decay.float())]
    out = torch.empty(num, heads, values, dtype=value.dtype)
    call = DeltaCall(
        *(states.data_ptr(), places.before, places.after),
        *(part.data_ptr() for part in held),
        *(out.data_ptr(), num, heads, key_heads, keys, values, 1 if decay.dim() == 2 else keys),
        *(TYPES[value.dtype], torch.get_num_threads()),
    )
    library = native_library().library
    check_memory(library.expertd_delta(ctypes.addressof(call)))  # type: ignore[union-attr]
    return out


def fits(shape: tuple[int, ...], dtype: torch.dtype, rows: torch.dtype) -> bool:
    """Whether :func:`delta_step` knows states of ``shape`` and ``rows`` of that dtype."""
    return (
        native_library().library is not None
        and len(shape) == 3
        and max(shape[1:]) <= MAX_WIDTH
        and dtype is torch.float32
        and rows in DTYPES
    )
