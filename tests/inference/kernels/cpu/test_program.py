"""Operations in a program give the bits that they give alone."""

import ctypes
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from expertd.packing.quantizer import quantize
from expertd.packing.schemes import parse_precision
from expertd_inference.kernels.cpu.library import TYPES, LinearCall
from expertd_inference.kernels.cpu.native import NativeKernels, use_isa
from expertd_inference.kernels.cpu.program import AddCall, NormCall, Program
from expertd_inference.kernels.cpu.step import StepKernels, step_kernels
from expertd_inference.kernels.weights import QuantizedWeight

TYPE = TYPES[torch.bfloat16]


@pytest.fixture(params=["portable", "avx2", "avx512", "avx512bf16"])
def kernels(request: pytest.FixtureRequest) -> Iterator[StepKernels]:
    found = step_kernels()
    if found is None or use_isa(request.param) is None:
        pytest.skip("no such native code here")
    yield found
    use_isa(None)


def noise(*shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(torch.bfloat16)


def weight_of(precision: str, rows: int, columns: int) -> QuantizedWeight:
    matrix = parse_precision(precision).matrix("w", rows, columns)
    values = noise(rows, columns, seed=rows).float()
    return QuantizedWeight(matrix, quantize(values, matrix, optimize=False))


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_products_side_by_side(kernels: StepKernels, threads: int) -> None:
    """Of several forms, so that the input is prepared once for some and anew for others."""
    native = NativeKernels()
    columns = 256
    x, y = noise(1, columns), noise(1, columns, seed=1)
    # The last two are large enough to be divided.
    forms = [("4g64", 8), ("4g64", 24), ("4g16", 8), ("3g64", 16), ("2g64", 8), ("8g64", 5)]
    forms += [("4g64", 3000), ("3g64", 3000)]
    weights = [weight_of(*form, columns) for form in forms]
    norm = noise(columns, seed=2)
    total, normed = torch.empty_like(x), torch.empty_like(x)
    program = Program()
    program.add(AddCall(x.data_ptr(), y.data_ptr(), total.data_ptr(), columns, TYPE))
    addresses = (total.data_ptr(), norm.data_ptr(), normed.data_ptr())
    program.add(NormCall(*addresses, 1, columns, 1e-5, True, TYPE))
    prepared = [kernels.prepare(weight) for weight in weights]
    outs = [noise(1, rows) for _, rows in forms]
    for number, (call, out) in enumerate(zip(prepared, outs, strict=True)):
        assert call is not None
        linear = LinearCall(call.address, normed.data_ptr(), out.data_ptr(), 1, TYPE, 0)
        program.add(linear, beside=number > 0)
    # What needs a product comes after it: the least of them, so that others are still under way.
    after, second = noise(1, 8), weight_of("4g64", 8, 8 * 8)
    row = torch.empty(1, 64, dtype=torch.bfloat16).zero_()
    program.add(AddCall(outs[0].data_ptr(), outs[0].data_ptr(), row.data_ptr(), 8, TYPE))
    last = kernels.prepare(second)
    assert last is not None
    program.add(LinearCall(last.address, row.data_ptr(), after.data_ptr(), 1, TYPE, 0))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for _ in range(20):
            kernels.run(program, 0, 0)
            expected = kernels.rms_norm(x + y, norm, 1e-5, round_first=True)
            assert torch.equal(total, x + y)
            assert torch.equal(normed, expected)
            products = [native.linear(expected, weight) for weight in weights]
            for out, product in zip(outs, products, strict=True):
                assert torch.equal(out, product)
            assert torch.equal(row[:, :8], products[0] + products[0])
            assert torch.equal(after, native.linear(row, second))
            for out in (*outs, total, normed):
                out.fill_(torch.nan)
    finally:
        torch.set_num_threads(before)


def test_structures_are_those_of_the_header() -> None:
    """Sizes as the C++ compiler has them on 64-bit machines, without a hole."""
    from expertd_inference.kernels.cpu import program

    sizes = {"EmbedCall": 24, "AddCall": 40, "NormCall": 56, "AttendCall": 136, "RouteCall": 56}
    assert {name: ctypes.sizeof(getattr(program, name)) for name in sizes} == sizes
