"""Linear layers of one native call give what torch gives, but for the order of sums."""

import pytest
import torch
from torch import Tensor, nn

from expertd_inference.execution.lean import make_lean
from expertd_inference.kernels.cpu.step import DTYPES, StepKernels, step_kernels
from expertd_inference.kernels.cpu.switching import LEAST


@pytest.fixture(scope="module")
def kernels() -> StepKernels:
    found = step_kernels()
    if found is None:
        pytest.skip("native code is not built here")
    return found


def noise(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def lean(kernels: StepKernels, layer: nn.Linear) -> nn.Linear:
    model = nn.Sequential(layer.requires_grad_(requires_grad=False))
    model.config = object()
    make_lean(model, kernels)
    assert type(layer) is not nn.Linear
    return layer


@pytest.mark.parametrize("dtype", list(DTYPES), ids=str)
@pytest.mark.parametrize("bias", [True, False])
# one weight; less than a vector; vectors and a rest; more than one task
@pytest.mark.parametrize(("out", "columns"), [(1, 1), (3, 30), (33, 100), (700, 256)])
# one row; rows at once and a rest; more
@pytest.mark.parametrize("shape", [(), (1, 5), (3 * LEAST,)])
def test_a_plain_layer(
    kernels: StepKernels,
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
    layer = lean(kernels, layer.to(dtype))
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
    kernels: StepKernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = nn.Linear(64, 32, dtype=torch.bfloat16)
    many, wide = noise(LEAST + 1, 64, dtype=torch.bfloat16), noise(64)
    expected = layer(many)
    lean(kernels, layer)
    monkeypatch.setattr(kernels, "most_rows", lambda _, __: LEAST)
    assert torch.equal(layer(many), expected), "bit for bit"
    assert layer(many[:0]).shape == (0, 32)
    with pytest.raises(RuntimeError, match="dtype"):
        layer(wide)
    with pytest.raises(RuntimeError, match="shape"):
        layer(many[:1, :32])
    strided = noise(64, 2, dtype=torch.bfloat16).T
    torch.testing.assert_close(layer(strided), layer(strided.contiguous()), rtol=0, atol=0)


def test_another_weight_or_bias_is_seen(kernels: StepKernels) -> None:
    layer = lean(kernels, nn.Linear(64, 32, dtype=torch.bfloat16))
    row = noise(64, dtype=torch.bfloat16)
    before = layer(row)
    layer.bias = nn.Parameter(layer.bias + 1, requires_grad=False)
    torch.testing.assert_close(layer(row), before + 1, rtol=0.01, atol=0.01)
    layer.weight = nn.Parameter(torch.zeros_like(layer.weight), requires_grad=False)
    assert torch.equal(layer(row), layer.bias)
    layer.to(torch.float32)
    assert torch.equal(layer(row.float()), layer.bias)


def test_hooks_are_called(kernels: StepKernels) -> None:
    layer = lean(kernels, nn.Linear(64, 32))
    seen: list[int] = []
    layer.register_forward_hook(lambda *_: seen.append(1))
    layer(noise(64))
    assert seen
