"""The trunk's linear layers on a GPU against dequantizing: interpreted where no GPU is."""

import pytest
import torch
from torch.nn import functional

from expertd.packing.schemes import parse_precision
from expertd_inference.kernels.weights import QuantizedWeight
from expertstore.pack.codec import dequantize
from expertstore.pack.layout import scale_part
from tests.inference.kernels.gpu.cached_layer import random_parts
from tests.inference.kernels.gpu.gpu import DEVICE

triton_linear = pytest.importorskip("expertd_inference.kernels.gpu.triton_linear")


def random_weight(precision: str, rows: int, columns: int) -> QuantizedWeight:
    matrix = parse_precision(precision).matrix("model.layers.0.q_proj.weight", rows, columns)
    parts = random_parts(matrix, "BF16", generator=torch.Generator().manual_seed(1))
    return QuantizedWeight(matrix, {name: part.to(DEVICE) for name, part in parts.items()})


@pytest.mark.parametrize("shape", [(1,), (2, 1), (1, 3)], ids=["vector", "two", "tile"])
@pytest.mark.parametrize(
    ("precision", "rows", "columns"),
    [
        ("16", 10, 21),  # nothing divides
        ("8g128", 50, 128),  # rows that the last block has too many of
        ("4g64", 64, 192),  # three groups a row
        ("4g64m", 64, 128),  # a meta group for the whole matrix
        ("3g64", 40, 64),  # five units of eight rows
        ("2g16m", 32, 128),  # two meta groups, that end between rows
    ],
)
def test_every_scheme(precision: str, rows: int, columns: int, shape: tuple[int, ...]) -> None:
    weight = random_weight(precision, rows, columns)
    x = torch.randn(*shape, columns, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    found = triton_linear.linear(x, weight)
    parts = {name: part.cpu() for name, part in weight.parts.items()}
    expected = functional.linear(x.cpu(), dequantize(weight.matrix, parts, torch.float32))
    assert found.shape == (*shape, rows)
    # Sums of at most 192 products in another order.
    torch.testing.assert_close(found.cpu(), expected, atol=3e-6 * expected.abs().max(), rtol=0)


@pytest.mark.parametrize("precision", ["4g64", "2g16m"])
@pytest.mark.parametrize("tokens", [1, 3])
def test_scales_in_bfloat16(tokens: int, precision: str) -> None:
    weight = random_weight(precision, 64, 128)
    name = scale_part(weight.matrix)
    parts = {**weight.parts, name: weight.parts[name].bfloat16()}
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    found = triton_linear.linear(x, QuantizedWeight(weight.matrix, parts))
    on_cpu = {name: part.cpu() for name, part in parts.items()}
    expected = functional.linear(x.cpu(), dequantize(weight.matrix, on_cpu, torch.float32))
    torch.testing.assert_close(found.cpu(), expected, atol=3e-6 * expected.abs().max(), rtol=0)


@pytest.mark.parametrize("tokens", [1, 3])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype, tokens: int) -> None:
    weight = random_weight("4g64", 64, 128)
    x = torch.randn(tokens, 128, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    found = triton_linear.linear(x, weight)
    parts = {name: part.cpu() for name, part in weight.parts.items()}
    expected = functional.linear(x.cpu(), dequantize(weight.matrix, parts, dtype))
    assert found.dtype == dtype
    # A neighbour of the result, where a weight that the reference rounds tips the scale.
    atol = 2 * torch.finfo(dtype).eps * expected.abs().max().item()
    torch.testing.assert_close(found.cpu(), expected, atol=atol, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    "precision", ["32", "8g64", "4g64", "4g16m", "3g64", "3g32m", "2g16", "2g16m"]
)
def test_a_token_alone_is_what_it_is_among_many(precision: str, dtype: torch.dtype) -> None:
    if precision == "32":  # plain weights that are rounded to what is computed in
        weight = random_weight("16", 256, 128)
        parts = {name: part.float() * 1.001 for name, part in weight.parts.items()}
        weight = QuantizedWeight(weight.matrix, parts)
    else:
        weight = random_weight(precision, 256, 128)
    x = torch.randn(3, 128, generator=torch.Generator().manual_seed(2)).to(DEVICE, dtype)
    among_many = triton_linear.linear(x, weight)[:1]
    alone = triton_linear.linear(x[:1], weight)
    # Neighbours where the order of sums tips a scale; of weights that only one rounds a third.
    assert (alone != among_many).float().mean().item() < 0.03


def test_columns_that_are_not_in_order_are_put_in_order() -> None:
    weight = random_weight("4g64", 64, 128)
    x = torch.randn(128, 4, generator=torch.Generator().manual_seed(2)).to(DEVICE)
    found = triton_linear.linear(x.t(), weight)
    assert torch.equal(found, triton_linear.linear(x.t().contiguous(), weight))


def test_no_tokens() -> None:
    found = triton_linear.linear(torch.zeros(0, 128, device=DEVICE), random_weight("4g64", 64, 128))
    assert found.shape == (0, 64)


def test_what_does_not_fit_is_refused() -> None:
    weight = random_weight("4g64", 64, 128)
    with pytest.raises(ValueError, match="takes 128"):
        triton_linear.linear(torch.zeros(1, 64, device=DEVICE), weight)
    with pytest.raises(ValueError, match="float64"):
        triton_linear.linear(torch.zeros(1, 128, dtype=torch.float64, device=DEVICE), weight)
