"""Linear layers of one native call give what torch gives, but for the order of sums."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from expertd_inference.kernels.cpu.linear import DTYPES, LinearKernels, linear_kernels
from expertd_inference.kernels.cpu.switching import LEAST
from expertd_inference.model.native_linear import NativeLinear, use_native_linears
from tests.inference.greedy import greedy, prompt_of

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def kernels() -> LinearKernels:
    found = linear_kernels()
    if found is None:
        pytest.skip("native code is not built here")
    return found


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def native(kernels: LinearKernels, layer: nn.Linear) -> NativeLinear:
    model = nn.Sequential(layer.requires_grad_(requires_grad=False))
    use_native_linears(model, kernels)
    (made,) = model
    assert isinstance(made, NativeLinear)
    return made


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("bias", [True, False])
# one weight; less than a vector; vectors and a rest; more than one task
@pytest.mark.parametrize(("out", "columns"), [(1, 1), (3, 30), (33, 100), (700, 256)])
# one row; rows at once and a rest; more
@pytest.mark.parametrize("shape", [(), (1, 5), (3 * LEAST,)])
def test_a_plain_layer(
    kernels: LinearKernels,
    dtype: torch.dtype,
    bias: bool,
    out: int,
    columns: int,
    shape: tuple[int, ...],
) -> None:
    layer = nn.Linear(columns, out, bias=bias)
    layer.weight.data = noise(out, columns)
    if bias:
        layer.bias.data = noise(out, seed=1)
    layer = native(kernels, layer.to(dtype))
    rows = noise(*shape, columns, dtype=dtype, seed=2)
    ours = layer(rows)
    exact = rows.double() @ layer.weight.double().T
    if bias:
        exact = exact + layer.bias.double()
    assert ours.dtype == dtype
    # Rounded once: half a step of the type; and a float32 sum of so many products.
    rtol = torch.finfo(dtype).eps / 2 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(ours.double(), exact, rtol=1.01 * rtol, atol=1e-6 * columns)


def test_what_is_better_left_to_torch(
    kernels: LinearKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.Linear(64, 32, dtype=torch.bfloat16)
    many, wide = noise(LEAST + 1, 64, dtype=torch.bfloat16), noise(64)
    expected = layer(many)
    layer = native(kernels, layer)
    monkeypatch.setattr(kernels, "most_rows", lambda _, __: LEAST)
    assert torch.equal(layer(many), expected), "bit for bit"
    assert layer(many[:0]).shape == (0, 32)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(wide)
    with pytest.raises(RuntimeError, match="shape"):
        layer(many[:1, :32])
    strided = noise(64, 2, dtype=torch.bfloat16).T
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()), rtol=0, atol=0)


def test_another_weight_or_bias_is_seen(kernels: LinearKernels) -> None:
    layer = native(kernels, nn.Linear(64, 32, dtype=torch.bfloat16))
    row = noise(64, dtype=torch.bfloat16)
    before = layer(row)
    layer.bias = nn.Parameter(layer.bias + 1, requires_grad=False)
    torch.testing.assert_close(layer(row), before + 1, rtol=0.01, atol=0.01)
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    assert torch.equal(layer(row), layer.bias)
    layer.to(torch.float32)
    assert torch.equal(layer(row.float()), layer.bias)


def test_hooks_are_called(kernels: LinearKernels) -> None:
    layer = native(kernels, nn.Linear(64, 32))
    seen: list[int] = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    layer(noise(64))
    assert seen


@pytest.mark.parametrize("wanted", ["rows", "weight"])
def test_gradients_are_torch_s(kernels: LinearKernels, wanted: str) -> None:
    stock = nn.Linear(64, 32).requires_grad_(wanted == "weight")
    ours = NativeLinear(stock, kernels)
    rows = noise(2, 64).requires_grad_(wanted == "rows")
    of = rows if wanted == "rows" else stock.weight
    gradients = [torch.autograd.grad(layer(rows).square().sum(), of) for layer in (stock, ours)]
    assert torch.equal(gradients[0][0], gradients[1][0])


def test_the_model_is_what_it_was_but_for_that(kernels: LinearKernels) -> None:
    shared = nn.Linear(8, 8)
    model = nn.ModuleDict({"a": shared, "b": nn.ModuleList([nn.Linear(8, 4, bias=False), shared])})
    model.eval()
    before = model.state_dict()
    use_native_linears(model, kernels)
    after = model.state_dict()
    assert list(before) == list(after)
    assert all(after[name].data_ptr() == before[name].data_ptr() for name in before)
    assert model["a"] is model["b"][1], "one layer in two places stays one"  # type: ignore[index]
    assert not any(module.training for module in model.modules())
    assert "in_features=8" in repr(model["a"])


@pytest.mark.parametrize("architecture", ["olmoe", "gpt_oss", "deepseek_v3"])
def test_a_model_gives_the_same_text(
    architecture: str, stock: Make, kernels: LinearKernels
) -> None:
    theirs = stock(architecture, torch.bfloat16)
    ours = copy.deepcopy(theirs)
    use_native_linears(ours, kernels)
    assert type(ours.lm_head) is NativeLinear
    prompt = prompt_of(20)
    # One expert chosen otherwise changes everything after it, but not at once.
    assert greedy(ours, prompt, 8) == greedy(theirs, prompt, 8)
