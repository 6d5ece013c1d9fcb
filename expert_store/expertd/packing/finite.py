"""Values that are no numbers, or would be none in the type that they are to be written in."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from expertd.packing.checkpoint_files import CheckpointTensor
from expertstore.pack.codec import E8M0_NAN


def flaw(values: Tensor, dtype: torch.dtype) -> str:
    """What is lost when ``values`` (floating) are written as ``dtype``; empty if nothing is.

    One pass: NaN and infinity reach the extremes.
    """
    if not values.is_floating_point() or not values.numel():
        return ""
    if values.dtype.itemsize == 1:  # FP8, whose extremes torch does not look for
        values = values.float()
    low, high = (extreme.to(torch.float64) for extreme in torch.aminmax(values))
    largest = torch.maximum(low.abs(), high.abs())
    if largest.isnan():
        return "NaN"
    if largest.isinf():
        return "infinity"
    name = str(dtype).removeprefix("torch.")
    if largest.to(dtype).isinf():
        return f"{largest:.3g}, which is more than {name} holds"
    if largest and not largest.to(dtype):
        return f"nothing above {largest:.3g}, which {name} has no number for but zero"
    return ""


def flaws(
    pieces: Iterable[tuple[CheckpointTensor, Tensor]], dtype: torch.dtype, expert: int = -1
) -> list[str]:
    """A clause for each of ``pieces`` with a flaw, each a tensor of a file and values of it.

    Where these are not all of the tensor's, they are those of ``expert``.
    """
    found = []
    for source, values in pieces:
        if values.dtype == torch.uint8 and "scale" in source.name:  # exponents
            what = "NaN" if bool((values == E8M0_NAN).any()) else ""
        else:
            what = flaw(values, dtype)
        if what:
            where = f" in expert {expert}" if values.numel() < math.prod(source.entry.shape) else ""
            found.append(f"{source.name} holds {what}{where}")
    return found
