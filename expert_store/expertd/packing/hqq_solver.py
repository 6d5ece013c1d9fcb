"""The solver of the package ``hqq`` (Badri & Shaji, 2023), on the CPU or on a GPU."""

import math
from importlib.metadata import version

import torch
from torch import Tensor

from expertd.packing.cores import cores
from expertstore.pack.codec import encode
from expertstore.pack.layout import Matrix

CPU_ELEMENTS = 1 << 16
"""Weights that the solver gets at a time: its dozen temporaries then stay in a core's cache,
and its stopping criterion is that of a few rows."""
GPU_ELEMENTS = 1 << 24
"""The same on a GPU, where the temporaries take half a GiB."""


class HqqSolver:
    """Calls ``hqq``, with as many weights at a time as suit the device."""

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self.version = f"hqq {version('hqq')} on {device.partition(':')[0]}"

    def solve(
        self,
        weight: Tensor,
        matrix: Matrix,
        q: Tensor,
        *,
        optimize: bool,
        scales: torch.dtype = torch.float16,
    ) -> tuple[Tensor, Tensor]:
        """See :class:`expertd.packing.solver.Solver`."""
        unit = _unit(weight)
        weight = weight.to(torch.float32) / unit if unit != 1 else weight
        on_gpu = self.device != "cpu"
        # Rows in whole groups; HQQ's own grouping of axis 1 is then ours.
        num_rows = max(1, (GPU_ELEMENTS if on_gpu else CPU_ELEMENTS) // matrix.in_features)
        rows = torch.split(weight, num_rows)
        run = map if on_gpu else cores().map
        results = run(
            lambda part: self._quantize(part, matrix.bits, matrix.group_size, optimize=optimize),
            rows,
        )
        integers, scale, zero = (torch.cat(pieces).cpu() for pieces in zip(*results, strict=True))
        groups = (matrix.out_features, matrix.in_features // matrix.group_size)
        scale, zero = scale.view(groups) * unit, zero.view(groups)
        stored = _storable(scale, scales)
        if not torch.equal(stored, scale):
            scaled = weight.cpu().float().view(*groups, -1) * (unit / stored[..., None])
            highest = (1 << matrix.bits) - 1
            integers = (scaled + zero[..., None]).round().clamp(0, highest).to(torch.uint8)
            integers = integers.view(matrix.out_features, matrix.in_features)
        q.copy_(encode(integers, matrix.bits))
        return stored, zero

    def quantize_meta(
        self, values: Tensor, group_size: int, scales: torch.dtype = torch.float16
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See :class:`expertd.packing.solver.Solver`."""
        # HQQ takes a group that spans less than 1e-4 for constant. That is made for weights;
        # scales are smaller, so they are brought near 1 first. A power of two costs no bits.
        unit = torch.exp2(values.abs().max().clamp(min=1e-30).log2().ceil())
        scaled = (values / unit).view(1, -1)
        q, scale, zero = (part.cpu() for part in self._quantize(scaled, 8, group_size))
        stored = _storable(scale * unit, scales)
        if not torch.equal(stored, scale * unit):
            inverse = 1 / stored[:, None]
            rows = values.cpu().view(-1, group_size)
            zero = -rows.min(1)[0] * inverse[:, 0]
            q = (rows * inverse + zero[:, None]).round().clamp(0, 255).to(torch.uint8)
        return q.view(-1), stored.to(scales), zero.to(torch.float16)

    def _quantize(
        self, weight: Tensor, bits: int, group_size: int, *, optimize: bool = False
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Integers [rows, in] (uint8), scale and zero [rows * in / group_size] (float32)."""
        # Half a second, which a packing with the native solver does not need.
        from hqq.core.quantize import Quantizer

        q, meta = Quantizer.quantize(
            weight.to(self.device, torch.float32),
            nbits=bits,
            group_size=group_size,
            optimize=optimize,
            axis=1,
            bitpack=False,
            device=self.device,
        )
        scale, zero = (meta[name].to(torch.float32).view(-1) for name in ("scale", "zero"))
        return q.view(weight.shape).to(torch.uint8), scale, zero


def _unit(weight: Tensor) -> float:
    """The power of two by which weights far from hqq's usual ones are divided first.

    It takes a group that spans less than 1e-4 for constant, and bounds scales for fp16.
    """
    largest = float(weight.abs().max()) if weight.numel() else 0.0
    if not math.isfinite(largest) or largest == 0 or 2**-7 <= largest <= 2**5:
        return 1.0
    return math.ldexp(1.0, math.frexp(largest)[1] + 3)


def _storable(scale: Tensor, dtype: torch.dtype) -> Tensor:
    """``scale`` (float32) as numbers above of the type that it is stored in.

    Of fp16 only where it is subnormal: above that hqq rounds after it has chosen the integers.
    """
    if dtype == torch.bfloat16:
        return ((scale.view(torch.int32) + 0xFFFF) & ~0xFFFF).view(torch.float32)
    if dtype == torch.float16:
        units = (scale * 2**24).ceil().clamp(min=1)
        return torch.where(scale < 2**-14, units / 2**24, scale)
    return scale
