"""The quantizer: HQQ's decision, written in our bytes."""

import os

import pytest
import torch
from hqq.core.quantize import Quantizer
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd.packing import hqq_solver, native_solver
from expertd.packing.cores import cores
from expertd.packing.hqq_solver import HqqSolver
from expertd.packing.quantizer import quantize
from expertd.packing.schemes import Precision, parse_precision
from expertd.packing.solver import Solver, choose_solver
from expertstore.pack.codec import decode, dequantize

# Relative error of a normal matrix, measured; with and without the solver.
ERRORS = {
    "8g128": (0.0057, 0.0060),
    "4g64": (0.086, 0.090),
    "4g64m": (0.086, 0.090),
    "3g64m": (0.185, 0.193),
    "2g16m": (0.303, 0.328),
}


def weights(rows: int, columns: int, deviation: float = 0.02, seed: int = 0) -> torch.Tensor:
    return deviation * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


@pytest.fixture(params=["fastest", "hqq"])
def solver(request: pytest.FixtureRequest) -> Solver:
    """The native one, where it is built, and hqq's."""
    return choose_solver().solver if request.param == "fastest" else HqqSolver()


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_it_is_what_hqq_dequantizes(bits: int, optimize: bool) -> None:
    weight = weights(64, 128).to(torch.bfloat16)
    matrix = Precision(bits, 64).matrix("m", 64, 128)
    parts = quantize(weight, matrix, optimize=optimize, solver=HqqSolver())
    packed, meta = Quantizer.quantize(
        weight, nbits=bits, group_size=64, axis=1, optimize=optimize, device="cpu"
    )
    assert torch.equal(parts["m.q"].view(-1), packed.view(-1))
    for name in ("scale", "zero"):  # as fp16, which is what a pack holds
        meta[name] = meta[name].to(torch.float16)
        assert torch.equal(parts[f"m.{name}"].view(-1), meta[name].view(-1))
    meta["compute_dtype"] = torch.float32
    assert torch.equal(dequantize(matrix, parts, torch.float32), Quantizer.dequantize(packed, meta))


def test_three_bits_are_hqqs_integers() -> None:
    weight = weights(64, 128)
    matrix = Precision(3, 64).matrix("m", 64, 128)
    parts = quantize(weight, matrix, optimize=True, solver=HqqSolver())
    packed, _ = Quantizer.quantize(weight, nbits=3, group_size=64, axis=1, device="cpu")
    unpacked = Quantizer.unpack["3bit_32"](packed)[: 64 * 128 // 64]
    assert torch.equal(decode(parts["m.q"], 3).view(-1, 64), unpacked)


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("text", ERRORS)
def test_error_of_a_normal_matrix(text: str, optimize: bool, solver: Solver) -> None:
    weight = weights(256, 512)
    matrix = parse_precision(text).matrix("m", 256, 512)
    parts = quantize(weight, matrix, optimize=optimize, solver=solver)
    result = dequantize(matrix, parts, torch.float32)
    error = ((result - weight).norm() / weight.norm()).item()
    expected = ERRORS[text][0 if optimize else 1]
    assert 0.95 * expected < error < 1.03 * expected


@pytest.mark.parametrize("optimize", [True, False])
@pytest.mark.parametrize("text", ERRORS)
def test_the_error_is_the_same_at_any_size(text: str, optimize: bool, solver: Solver) -> None:
    """Also where the scales of fp16 end, and where it has few digits or none."""
    weight = weights(64, 512)
    matrix = parse_precision(text).matrix("m", 64, 512)

    def error(factor: float) -> float:
        scaled = weight * factor
        parts = quantize(scaled, matrix, optimize=optimize, solver=solver)
        difference = dequantize(matrix, parts, torch.float32) - scaled
        return (difference.norm() / scaled.norm()).item()

    usual = error(1)
    for exponent in (-60, -30, -20, -14, -11, -9, -7, 14, 20, 30, 60):
        # 8 digits round a scale up by 2^-7 at most, and 5 where fp16 has no more by a bit less.
        assert error(2.0**exponent) < 1.05 * usual, exponent


@pytest.mark.parametrize("value", [1e-9, -1e-6, 3e-5, 1e-3, 1e6])
def test_equal_weights_of_any_size(value: float, solver: Solver) -> None:
    weight = torch.full((16, 64), value)
    weight[3] = torch.linspace(0, value, 64)
    matrix = Precision(4, 64).matrix("m", 16, 64)
    result = dequantize(
        matrix, quantize(weight, matrix, optimize=True, solver=solver), torch.float32
    )
    assert torch.allclose(result[4:], weight[4:], rtol=0.01)


@pytest.mark.parametrize("deviation", [1e-3, 0.02, 1.0, 30.0])
def test_meta_groups_follow_the_size_of_the_weights(deviation: float, solver: Solver) -> None:
    """HQQ alone takes scales that span less than 1e-4 for equal, which small weights have."""
    weight = weights(64, 512, deviation)
    errors = []
    for text in ("4g64", "4g64m"):
        matrix = parse_precision(text).matrix("m", 64, 512)
        parts = quantize(weight, matrix, optimize=False, solver=solver)
        result = dequantize(matrix, parts, torch.float32)
        errors.append((result - weight).norm() / weight.norm())
    assert errors[1] < 1.02 * errors[0]


def test_pieces_of_rows_are_joined_in_order(
    monkeypatch: pytest.MonkeyPatch, solver: Solver
) -> None:
    weight = weights(40, 64)
    matrix = Precision(4, 32).matrix("m", 40, 64)
    whole = quantize(weight, matrix, optimize=False, solver=solver)
    monkeypatch.setattr(hqq_solver, "CPU_ELEMENTS", 7 * 64)
    monkeypatch.setattr(native_solver, "TASK_ELEMENTS", 7 * 64)
    pieces = quantize(weight, matrix, optimize=False, solver=solver)
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)


@settings(max_examples=20, deadline=None)
@given(text=st.sampled_from(["8g32", "4g16", "3g64m", "2g16m"]), seed=st.integers(0, 100))
def test_equal_input_gives_equal_bytes(text: str, seed: int) -> None:
    weight = weights(32, 128, seed=seed)
    matrix = parse_precision(text).matrix("m", 32, 128)
    one, other = (quantize(weight, matrix, optimize=True) for _ in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_bytes_do_not_depend_on_the_number_of_cores(
    monkeypatch: pytest.MonkeyPatch, solver: Solver
) -> None:
    monkeypatch.setattr(native_solver, "TASK_ELEMENTS", 1 << 14)
    weight = weights(256, 1024)
    matrix = Precision(4, 64).matrix("m", 256, 1024)
    results = []
    for number in (1, 5):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, number=number: set(range(number)))
        cores.cache_clear()
        results.append(quantize(weight, matrix, optimize=True, solver=solver))
        cores().shutdown()
    cores.cache_clear()
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])


@pytest.mark.parametrize("value", [0.0, 0.25, -3.0])
def test_equal_weights_survive(value: float, solver: Solver) -> None:
    weight = torch.full((16, 64), value)
    matrix = Precision(4, 64).matrix("m", 16, 64)
    parts = quantize(weight, matrix, optimize=True, solver=solver)
    result = dequantize(matrix, parts, torch.float32)
    assert torch.allclose(result, weight, atol=1e-3)


@pytest.mark.parametrize("text", ["4g64", "4g64m"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, text: str, solver: Solver) -> None:
    weight = weights(128, 64)
    weight[3, 5] = value
    with pytest.raises(ValueError, match=r"m\.(scale|zero).* is not finite"):
        quantize(weight, parse_precision(text).matrix("m", 128, 64), optimize=True, solver=solver)
