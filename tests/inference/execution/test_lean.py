"""A lean model computes what the model computes, and is lean where it says so."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from expertd.packing.quantizer import quantize
from expertd.packing.schemes import parse_precision
from expertd_inference.execution.lean import make_lean
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.kernels.cpu.step import DTYPES, StepKernels, step_kernels
from expertd_inference.model.quantized_linear import QuantizedLinear
from tests.architectures.batches import alone, batched_model
from tests.inference.greedy import greedy, prompt_of

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
@pytest.mark.parametrize(
    "architecture", [*sorted(ROUTED), "gpt_oss", "deepseek_v3", "granitemoe", "phimoe"]
)
def test_a_lean_model_is_the_model(
    architecture: str, dtype: torch.dtype, stock: Make, kernels: StepKernels
) -> None:
    theirs = stock(architecture, dtype)
    ours = copy.deepcopy(theirs)
    make_lean(ours, kernels)
    kinds = {type(module).__name__ for module in ours.modules()}
    # phimoe has LayerNorms.
    assert any(kind.startswith("Lean") and "RMSNorm" in kind for kind in kinds) == (
        architecture != "phimoe"
    )
    assert any(kind.startswith("Lean") and "Router" in kind for kind in kinds) == (
        # granitemoe's softmax over the chosen ones is the same but for how bfloat16 is rounded.
        architecture in ROUTED or (architecture == "granitemoe" and dtype == torch.float32)
    )
    # gpt_oss has half as many angles.
    assert any(hasattr(module, "expertd_rotates") for module in ours.modules()) == (
        architecture != "gpt_oss"
    )
    # gpt_oss has sinks, which sdpa lacks too.
    assert (ours.config._attn_implementation == "expertd-sdpa") == (
        theirs.config._attn_implementation == "sdpa"
    )
    prompt = prompt_of(20)
    # One expert chosen otherwise changes everything after it, but not at once.
    assert greedy(ours, prompt, 8) == greedy(theirs, prompt, 8)
    with torch.no_grad():
        past = ours(torch.tensor([prompt])).past_key_values
        step = ours(torch.tensor([[5]]), past_key_values=past).logits
        whole = theirs(torch.tensor([[*prompt, 5]])).logits[:, -1:]
    # bf16: three layers' roundings to 8 bits; float32: the order of sums.
    torch.testing.assert_close(step, whole, rtol=0, atol=0.1 if dtype == torch.bfloat16 else 1e-4)


@pytest.mark.parametrize(
    "model_type",
    # Norms with a gate, or without a weight; attention with a function of its own file; a rotation
    # of queries alone.
    ["qwen3_next", "granitemoehybrid", "kimi_linear", "mimo_v2_flash", "qwen4_exp_text"],
)
def test_parts_that_are_called_otherwise(model_type: str, kernels: StepKernels) -> None:
    model = batched_model(model_type)
    expected = alone(model, prompt_of(12))
    make_lean(model, kernels)
    torch.testing.assert_close(alone(model, prompt_of(12)), expected, rtol=1e-3, atol=1e-4)


def test_what_is_not_the_same_stays(kernels: StepKernels) -> None:
    class OffsetRMSNorm(nn.Module):
        """As Gemma's: the weight is an offset from one."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(32))
            self.variance_epsilon = 1e-6

        def forward(self, x: Tensor) -> Tensor:
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1 + self.weight)

    class SigmoidRouter(nn.Module):
        """As DeepSeek-V3's, without groups."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(8, 32))
            self.top_k = 2

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            logits = nn.functional.linear(x, self.weight)
            return logits, *torch.topk(logits.sigmoid(), self.top_k)

    model = nn.Sequential(OffsetRMSNorm(), SigmoidRouter())
    model.config = object()
    make_lean(model, kernels)
    assert [type(module) for module in model] == [OffsetRMSNorm, SigmoidRouter]


def test_many_tokens_take_the_long_way(stock: Make, kernels: StepKernels) -> None:
    theirs = stock("qwen3_moe")
    ours = copy.deepcopy(theirs)
    make_lean(ours, kernels)
    prompt = torch.tensor([prompt_of(100)])
    with torch.no_grad():
        norm, router = ours.model.norm, ours.model.layers[0].mlp.gate
        x = noise(100, 128, dtype=torch.bfloat16)
        assert torch.equal(norm(x), theirs.model.norm(x))
        for left, right in zip(router(x), theirs.model.layers[0].mlp.gate(x), strict=True):
            assert torch.equal(left, right)
        # Attention of a prompt is sdpa's, and so bit for bit the same.
        assert ours(prompt).logits.shape == theirs(prompt).logits.shape


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


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("shape", [(64,), (1, 1, 64), (3, 64)])
def test_a_quantized_layer(kernels: StepKernels, shape: tuple[int, ...], bias: bool) -> None:
    matrix = parse_precision("4g64").matrix("x.weight", 32, 64)
    layer = QuantizedLinear(nn.Linear(64, 32, bias=bias), matrix)
    native = NativeKernels()
    layer.load(quantize(noise(32, 64), matrix, optimize=False), native.linear)
    rows = noise(*shape, dtype=torch.bfloat16)
    expected = layer.to(torch.bfloat16)(rows)
    model = nn.Sequential(layer)
    model.config = object()
    make_lean(model, kernels)
    assert type(layer) is not QuantizedLinear
    assert torch.equal(layer(rows), expected)
    # Loaded anew it computes with what was loaded.
    layer.load(quantize(noise(32, 64, seed=1), matrix, optimize=False), native.linear)
    assert not torch.equal(layer(rows), expected)
    seen = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    layer(rows)
    assert seen, "hooks are called"
