"""Types of blocks: what a record makes of them beside what the gguf package dequantizes."""

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from expertd.packing.gguf.blocks import dequantize, split
from expertd.packing.gguf.types import EXACT, KEPT, NEAREST, PLAIN_TYPES, is_known, precision_of
from expertd.packing.quantizer import quantize
from expertstore.pack.codec import dequantize as dequantize_matrix
from tests.gguf_files import random_blocks, to_blocks

SHAPE = (64, 512)


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("kind", list(KEPT), ids=lambda kind: kind.name)
def test_types_that_are_kept(kind: Type) -> None:
    blocks = torch.from_numpy(random_blocks(SHAPE, kind))
    expected, kept = dequantize(kind, blocks), split(kind, blocks)
    found = kept.dequantize(torch.float32)
    assert kept.precision == KEPT[kind] == precision_of(kind)
    if kind in EXACT:
        assert torch.equal(found, expected)
    else:  # scales and zeros of 16 bits
        assert 0 < error(found, expected) < 1e-3
        # No weight moves by more than what the zero of its group is rounded to.
        assert float((found - expected).abs().max() / expected.abs().max()) < 4e-3


@pytest.mark.parametrize(
    ("kind", "most"),
    [
        *((kind, 0.007) for kind in (Type.Q5_0, Type.Q5_1, Type.Q5_K, Type.Q6_K)),
        *((kind, 0.09) for kind in (Type.IQ4_NL, Type.IQ4_XS, Type.IQ3_S, Type.IQ2_XXS)),
    ],
    ids=str,
)
def test_types_that_are_quantized_anew(kind: Type, most: float) -> None:
    weights = np.random.default_rng(0).normal(size=SHAPE).astype(np.float32)
    expected = dequantize(kind, torch.from_numpy(to_blocks(weights, kind)))
    matrix = precision_of(kind).matrix("w", *SHAPE)
    parts = quantize(expected, matrix, optimize=True)
    assert 0 < error(dequantize_matrix(matrix, parts, torch.float32), expected) < most


@pytest.mark.parametrize("kind", [Type.Q4_1, Type.Q2_K, Type.Q4_K], ids=lambda kind: kind.name)
def test_groups_of_equal_weights(kind: Type) -> None:
    """The scale is 0, or nothing beside the minimum: no zero in 16 bits says that."""
    blocks = random_blocks((8, 256), kind).reshape(8, -1, gguf.GGML_QUANT_SIZES[kind][1])
    # The scale comes before the minimum, in a block's 16-bit factors.
    place = 80 if kind is Type.Q2_K else 0
    for row, factor in enumerate([0, 1e-7, 6e-8, -0.0]):
        blocks[row, :, place : place + 2] = np.array([factor], np.float16).view(np.uint8)
    blocks = torch.from_numpy(blocks.reshape(8, -1))
    expected, found = dequantize(kind, blocks), split(kind, blocks)
    assert found.is_finite
    weights = found.dequantize(torch.float32)
    assert bool(weights.isfinite().all())
    assert error(weights, expected) < 1e-3
    assert error(weights[:4], expected[:4]) < 2e-3


def test_all_types_but_those_of_activations_are_known() -> None:
    unknown = {kind for kind in Type if not is_known(kind)}
    assert {kind.name for kind in unknown} == {
        *("Q8_1", "Q8_K", "I8", "I16", "I32", "I64", "F64"),
        "Q1_0",  # which the gguf package does not dequantize
        "NVFP4",  # its second factor is a tensor of its own
    }
    assert not (KEPT.keys() & NEAREST.keys()) | (PLAIN_TYPES.keys() & NEAREST.keys())
