"""The small operations of a step give what torch's give."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from expertd_inference.kernels.cpu.step import DTYPES, StepKernels, step_kernels

Make = Callable[..., Any]

ROUTED = {"mixtral", "qwen2_moe", "qwen3_moe", "olmoe"}
"""Whose routers are a softmax over all experts."""


@pytest.fixture(scope="module")
def kernels() -> StepKernels:
    found = step_kernels()
    if found is None:
        pytest.skip("native code is not built here")
    return found


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("round_first", [True, False])
# 1 and 15: less than a vector; 100: a rest; (0, 64): nothing at all
@pytest.mark.parametrize("shape", [(1, 1), (3, 15), (2, 100), (1, 4, 128), (0, 64)])
def test_rms_norm(
    kernels: StepKernels, dtype: torch.dtype, round_first: bool, shape: tuple[int, ...]
) -> None:
    x, weight = noise(*shape, dtype=dtype), 1 + noise(shape[-1], seed=1).to(dtype)
    wide = x.double()
    exact = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-5)
    if round_first:
        exact = exact.to(dtype).double()
    # Half a step of the result's type, and one of the rounded quotient's, whose sum's order counts.
    tolerance = 2 * torch.finfo(dtype).eps if dtype == torch.bfloat16 else 1e-5
    result = kernels.rms_norm(x, weight, 1e-5, round_first=round_first)
    torch.testing.assert_close(result.double(), exact * weight.double(), rtol=tolerance, atol=1e-6)


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("normalize", [True, False])
# all of them; partial_sort, which torch takes where k is small beside n; nth_element
@pytest.mark.parametrize(("n", "k"), [(8, 8), (128, 2), (128, 8), (60, 4), (1, 1)])
@pytest.mark.parametrize("steps", [None, 3])  # 3: a few values only, so that most are equal
def test_route(
    kernels: StepKernels, dtype: torch.dtype, normalize: bool, n: int, k: int, steps: int | None
) -> None:
    logits = noise(17, n)
    logits = (logits if steps is None else (logits * steps).round() / steps).to(dtype)
    weights, index = torch.topk(torch.softmax(logits.float(), dim=-1), k)
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    ours, chosen = kernels.route(logits, k, normalize=normalize, float_weights=True)
    assert torch.equal(chosen, index)
    torch.testing.assert_close(ours, weights, rtol=1e-6, atol=1e-7)  # the sum's order
    rounded, _ = kernels.route(logits, k, normalize=normalize, float_weights=False)
    assert torch.equal(rounded, ours.to(dtype))


def test_nan_comes_through(kernels: StepKernels) -> None:
    x = torch.tensor([[1.0, torch.nan, 2.0]])
    assert kernels.rms_norm(x, torch.ones(3), 1e-5, round_first=True).isnan().all()
    weights, index = kernels.route(x, 2, normalize=True, float_weights=True)
    assert weights.isnan().all()
    assert ((index >= 0) & (index < 3)).all()


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("d", [2, 30, 128])  # the least, half of it odd, as in most models
def test_rotate(kernels: StepKernels, dtype: torch.dtype, d: int) -> None:
    # As attention has them: heads of one token, transposed.
    query, key = (
        noise(1, 1, heads, d, dtype=dtype, seed=heads).transpose(1, 2) for heads in (6, 2)
    )
    cos, sin = noise(1, 1, d, dtype=dtype, seed=3), noise(1, 1, d, dtype=dtype, seed=4)
    for ours, theirs in zip(
        kernels.rotate(query, key, cos, sin),
        apply_rotary_pos_emb(query, key, cos, sin),
        strict=True,
    ):
        assert torch.equal(ours, theirs), "bit for bit"
