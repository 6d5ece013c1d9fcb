"""Plain weights times rows of activations, for every instruction set that this machine has."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.linear import PreparedCall, describe, linear_kernels
from expertd_inference.kernels.cpu.native import use_isa

pytestmark = pytest.mark.skipif(native_library().library is None, reason="no native kernels")

ISAS = ["portable", "avx2", "avx512", "avx512vnni", "avx512bf16"]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
SHAPES = [  # outputs, columns
    (1, 1),  # less than a block of rows, and than a register
    (3, 31),
    (4, 32),  # exactly both
    (5, 33),
    (7, 260),  # more columns than are padded to at a time
    (70, 1056),
]
ROWS = [1, 2, 3, 4, 5, 8, 33]  # blocks of 4, 3, 2 and 1; more than a call of `multiply` has


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if use_isa(request.param) is None:
        pytest.skip(f"no {request.param} here")
    yield request.param
    use_isa(None)


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    kernels = linear_kernels()
    assert kernels is not None
    out = rows.new_empty(len(rows), len(weight))
    kernels.multiply(PreparedCall(describe(weight, bias)), rows, out, len(rows))
    return out


def noise(rows: int, columns: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator).to(dtype)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("activations", DTYPES, ids=str)
def test_products(isa: str, dtype: torch.dtype, activations: torch.dtype) -> None:
    for outputs, columns in SHAPES:
        weight, bias = noise(outputs, columns, dtype), noise(1, outputs, dtype, 1)[0]
        x = noise(max(ROWS), columns, activations, 2)
        single = torch.cat([product(x[n : n + 1], weight, bias) for n in range(len(x))])
        exact = x.double() @ weight.double().T + bias.double()
        # Sums in float32 of up to 1,056 products of size 1, then one rounding.
        unit = torch.finfo(activations).eps
        assert ((single.double() - exact).abs() <= exact.abs() * unit + 2e-5 * columns**0.5).all()
        for rows in ROWS:
            assert torch.equal(product(x[:rows], weight, bias), single[:rows])


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_numbers_of_every_kind(isa: str, dtype: torch.dtype) -> None:
    """Each output is one weight: the smallest and largest, infinities, NaN and both zeros."""
    info = torch.finfo(dtype)
    numbers = [0.0, -0.0, info.tiny, -info.smallest_normal, info.max, torch.inf, -torch.inf]
    weight = torch.tensor([[number] for number in [*numbers, torch.nan]], dtype=dtype)
    x = torch.ones(3, 1, dtype=torch.float32)
    expected = weight.T.float().expand(3, -1)
    torch.testing.assert_close(product(x, weight), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_columns_past_the_end_are_not_read_as_weights(isa: str) -> None:
    # The rows after the one that is computed, and what lies behind the matrix, hold NaN.
    memory = torch.full((6, 50), torch.nan, dtype=torch.bfloat16)
    memory[:3] = noise(3, 50, torch.bfloat16)
    x = noise(5, 50, torch.bfloat16)
    assert not product(x, memory[:3]).isnan().any()
