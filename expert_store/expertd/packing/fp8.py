"""Matrices of a checkpoint in FP8 with a scale per block, as DeepSeek-V3 is published.

``NAME.weight`` is F8_E4M3 [out, in], and ``NAME.weight_scale_inv`` has one factor per block of
usually 128 x 128 weights; the last blocks of a row or column may be partial. The weight is the
product. No record holds FP8: what comes so is made 16-bit weights, which then go their way.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertd.packing.checkpoint_files import CheckpointTensor, check_shape
from expertstore.errors import CheckpointError

METHOD = "fp8"
"""``quant_method`` of such a checkpoint's configuration."""
DTYPE = "F8_E4M3"
TORCH_DTYPE = torch.float8_e4m3fn
SCALE = "_scale_inv"
"""What the name of a scale ends with, after the weight's."""

Block = tuple[int, int]


def block_size(config: Mapping[str, Any]) -> Block | None:
    """Rows and columns of a block; None if ``config``'s FP8 is of another kind."""
    quantization = config.get("quantization_config")
    size = quantization.get("weight_block_size") if isinstance(quantization, dict) else None
    if not isinstance(size, list) or len(size) != 2:
        return None
    rows, columns = size
    sound = isinstance(rows, int) and isinstance(columns, int) and rows > 0 and columns > 0
    return (rows, columns) if sound else None


def num_blocks(shape: tuple[int, ...], block: Block) -> tuple[int, ...]:
    """The shape of the scales of a weight [..., out, in]."""
    *experts, rows, columns = shape
    return (*experts, -(-rows // block[0]), -(-columns // block[1]))


def find_scales(
    path: Path, tensors: Sequence[CheckpointTensor], block: Block | None
) -> dict[str, CheckpointTensor]:
    """By the name of each of ``tensors`` in FP8, the tensor of its scales; none without blocks.

    Raises :class:`CheckpointError` if one is missing or of another shape.
    """
    if block is None:
        return {}
    by_name = {tensor.name: tensor for tensor in tensors}
    scales = {}
    for tensor in tensors:
        if tensor.entry.dtype != DTYPE or len(tensor.entry.shape) < 2:
            continue
        scale = by_name.get(f"{tensor.name}{SCALE}")
        if scale is None:
            raise CheckpointError(
                f"{path} lacks {tensor.name}{SCALE}; download the checkpoint again."
            )
        check_shape(scale, num_blocks(tensor.entry.shape, block))
        scales[tensor.name] = scale
    return scales


def dequantize(weight: Tensor, scales: Tensor, block: Block, dtype: torch.dtype) -> Tensor:
    """The weight [out, in] in ``dtype``: multiplied in float32 and rounded once."""
    rows, columns = weight.shape
    factors = scales.float().repeat_interleave(block[1], dim=1)[:, :columns]
    product = weight.float()
    for begin, row in zip(range(0, rows, block[0]), factors, strict=True):
        product[begin : begin + block[0]] *= row
    return product.to(dtype)
