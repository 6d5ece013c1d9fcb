"""What experts in GGUF lose where the scheme keeps what it can, in words for the user."""

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from expertd.packing.checkpoint import Checkpoint
from expertd.packing.gguf.blocks import dequantize, split
from expertd.packing.gguf.types import EXACT, PLAIN_TYPES, Type
from expertd.packing.gguf.weight import GgufWeight
from expertd.packing.quantizer import quantize
from expertstore.pack.codec import dequantize as dequantize_matrix
from expertstore.pack.layout import ROWS_PER_BYTE


def losses(checkpoint: Checkpoint) -> Iterator[str]:
    """A sentence for each type of the experts' matrices that is not kept bit for bit."""
    for weight, pieces in checkpoint.samples_by_kind():
        if isinstance(weight, GgufWeight) and (sentence := _sentence(weight, pieces)):
            yield sentence


def _sentence(weight: GgufWeight, pieces: Mapping[str, Tensor]) -> str:
    kind, blocks = weight.types[0], next(iter(pieces.values()))
    if kind in PLAIN_TYPES or (kind in EXACT and weight.form is not None) or blocks.dim() < 2:
        return ""
    loss = f"{100 * loss_of(kind, blocks, weight):.2g} % (relative, in the square mean of a sample)"
    if weight.form is not None:
        return (
            f"Experts in {weight.kind} keep their integers, as {weight.form.precision}; scales and "
            f"zeros are rounded to 16 bits, which moves the weights by {loss}."
        )
    return (
        f"Experts in {weight.kind} have no form of their own in a pack and are quantized anew, as "
        f"{weight.nearest}, which moves the weights by {loss}; --experts 16 rounds them to 16 bits."
    )


def loss_of(kind: Type, blocks: Tensor, weight: GgufWeight) -> float:
    """The relative error that a pack adds to rows of blocks [rows, bytes] of that type."""
    expected = dequantize(kind, blocks)
    if weight.form is not None:
        found = split(kind, blocks).dequantize(torch.float32)
    else:
        precision = weight.nearest
        assert precision is not None, "no form"
        rows = len(expected) // ROWS_PER_BYTE[precision.bits] * ROWS_PER_BYTE[precision.bits]
        expected = expected[:rows]
        matrix = precision.matrix("weight", *expected.shape)
        try:
            parts = quantize(expected, matrix, optimize=True)
        except ValueError:  # weights that are no numbers: told elsewhere, by expert
            return float("nan")
        found = dequantize_matrix(matrix, parts, torch.float32)
    return float((found - expected).norm() / expected.norm())
