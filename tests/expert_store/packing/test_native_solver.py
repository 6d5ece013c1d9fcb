"""The native solver against hqq: its own steps, its error, and the bytes of all variants."""

import pytest
import torch
from hqq.core.optimize import optimize_weights_proximal_legacy_step
from torch import Tensor

from expertd.packing.hqq_solver import HqqSolver
from expertd.packing.native_solver import LIBRARY, NativeSolver
from expertd.packing.quantizer import quantize, quantize_to
from expertd.packing.schemes import parse_precision
from expertd.packing.solver import choose_solver
from expertstore.errors import ConfigError, PreconditionError
from expertstore.native import SWITCH
from expertstore.pack.codec import decode, dequantize
from hatch_build import find_compiler

PRECISIONS = ("8g128", "8g16m", "4g64", "4g32m", "3g64m", "3g16", "2g16m", "2g128")
needs_library = pytest.mark.skipif(not LIBRARY.exists(), reason="no compiler built it")


def native(variant: str | None = None) -> NativeSolver:
    found = NativeSolver.load(variant)
    assert isinstance(found, NativeSolver), found
    return found


def normal(rows: int, columns: int, deviation: float = 0.02, seed: int = 0) -> Tensor:
    return deviation * torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed))


def heavy_tailed() -> Tensor:
    """Student's t with 3 degrees of freedom."""
    return normal(64, 512) / normal(3, 64 * 512, 1.0, 1).square().mean(0).sqrt().view(64, 512)


def with_outliers() -> Tensor:
    places = torch.rand(64, 512, generator=torch.Generator().manual_seed(2)) < 0.002
    return torch.where(places, 30 * normal(64, 512), normal(64, 512))


def with_constant_groups() -> Tensor:
    weight = normal(64, 512)
    weight[:, :128] = 0.25
    weight[::2, 128:256] = 0
    return weight


REALISTIC = {
    "normal": normal(64, 512),
    "heavy tails": heavy_tailed(),
    "outliers": with_outliers(),
    "constant groups": with_constant_groups(),
    "small": normal(64, 512, 1e-4),
    "tiny": normal(64, 512, 1e-6),
    "sparse": normal(64, 512) * (normal(64, 512, 1.0, 3) > 1),
    "large": normal(64, 512, 3.0),  # errors above the shrinking threshold of 0.17
}


def test_where_a_compiler_is_a_library_is() -> None:
    assert LIBRARY.exists() or find_compiler() is None, "run python hatch_build.py"


@needs_library
@pytest.mark.parametrize("text", PRECISIONS)
@pytest.mark.parametrize("kind", REALISTIC)
def test_the_error_is_not_above_hqqs(kind: str, text: str) -> None:
    weight = REALISTIC[kind]
    matrix = parse_precision(text).matrix("m", *weight.shape)
    errors = []
    for solver in (native(), HqqSolver()):
        parts = quantize(weight, matrix, optimize=True, solver=solver)
        errors.append((dequantize(matrix, parts, torch.float32) - weight).square().sum().item())
    # The bound is for scales and zeros that round to fp16 or 8 bits in another direction.
    assert errors[0] <= 1.001 * errors[1]


@needs_library
@pytest.mark.parametrize("bits", [8, 4, 3, 2])
@pytest.mark.parametrize("kind", ["normal", "heavy tails", "outliers", "large"])
def test_zeros_are_the_best_of_hqqs_own_steps(kind: str, bits: int) -> None:
    """hqq stops all groups at one of these steps; each group has the best of its own."""
    weight = REALISTIC[kind]
    matrix = parse_precision(f"{bits}g64").matrix("m", *weight.shape)
    q = torch.empty(64 * bits // 8, 512, dtype=torch.uint8)
    scale, zero = (part.view(-1, 1) for part in native().solve(weight, matrix, q, optimize=True))
    groups = weight.view(-1, 64)
    low, high = groups.min(1, keepdim=True)[0], groups.max(1, keepdim=True)[0]
    inverse = (2**bits - 1) / (high - low)
    step = -low * inverse
    zeros, errors = [], []
    for _ in range(21):
        zeros.append(step)
        x = groups * inverse + step
        errors.append((x - x.round().clamp(0, 2**bits - 1)).square().sum(1, keepdim=True))
        _, _, step, _ = optimize_weights_proximal_legacy_step(
            groups, inverse, step, [0, 2**bits - 1], 10.0, 0.7, 1
        )
    torch.testing.assert_close(scale, 1 / inverse)
    x = groups * inverse + zero
    error = (x - x.round().clamp(0, 2**bits - 1)).square().sum(1, keepdim=True)
    best = torch.cat(errors, 1).min(1, keepdim=True)[0]
    # A weight that lies between two integers may go either way by rounding alone.
    torch.testing.assert_close(error, best, rtol=2e-3, atol=1e-4)
    nearest = (torch.cat(zeros, 1) - zero).abs().min(1)[0]
    assert (nearest < 1e-3 * 2**bits).float().mean() > 0.99
    integers = (groups / scale + zero).round().clamp(0, 2**bits - 1)
    assert (decode(q, bits).view(-1, 64) != integers).float().mean() < 1e-3


@needs_library
@pytest.mark.parametrize("text", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_without_optimizing_it_is_hqqs_bytes(text: str, dtype: torch.dtype) -> None:
    weight = heavy_tailed().to(dtype)
    matrix = parse_precision(text).matrix("m", *weight.shape)
    ours, hqqs = (quantize(weight, matrix, optimize=False, solver=solver)
                  for solver in (native(), HqqSolver()))  # fmt: skip
    assert all(torch.equal(ours[name], hqqs[name]) for name in hqqs)


@needs_library
@pytest.mark.parametrize("text", PRECISIONS)
@pytest.mark.parametrize(
    ("rows", "groups"),
    [
        (8, 1),  # a single unit, and a lane of many
        (16, 17),  # a lane more than the widest vector has
        (24, 12),  # 30B-A3B's down: 768 inputs are 12 groups of 64
        (40, 4),
    ],
)
def test_all_variants_give_the_same_bytes(text: str, rows: int, groups: int) -> None:
    """The zeros as well, before they are rounded to fp16, which would hide a fused operation."""
    precision = parse_precision(text)
    columns = groups * precision.group_size
    weight = normal(rows, columns, 0.02)
    weight[::2] = normal(rows // 2, columns, 3.0)  # these shrink
    matrix = precision.matrix("m", rows, columns)
    for optimize in (True, False):
        results = []
        for variant in native().variants:
            q = torch.empty(rows * matrix.bits // 8, columns, dtype=torch.uint8)
            results.append((q, *native(variant).solve(weight, matrix, q, optimize=optimize)))
        for other in results[1:]:
            assert all(map(torch.equal, results[0], other))


@needs_library
def test_every_half_is_read() -> None:
    """All finite fp16 numbers, subnormals among them, as bfloat16 and float32 would be."""
    halves = torch.arange(0, 0x7C00, dtype=torch.int16).view(torch.float16)
    weight = torch.cat((halves, -halves)).view(-1, 512)
    matrix = parse_precision("8g16").matrix("m", *weight.shape)
    for variant in native().variants:
        one, other = (
            quantize(values, matrix, optimize=True, solver=native(variant))
            for values in (weight, weight.float())
        )
        assert all(torch.equal(one[name], other[name]) for name in one)


@needs_library
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_no_numbers_are_refused(value: float, dtype: torch.dtype) -> None:
    for variant in native().variants:
        for place in ((0, 0), (3, 5), (63, 511)):
            weight = normal(64, 512).to(dtype)
            weight[place] = value
            for text in ("4g64", "4g16m"):
                matrix = parse_precision(text).matrix("m", 64, 512)
                with pytest.raises(ValueError, match=r"m\.scale is not finite"):
                    quantize(weight, matrix, optimize=True, solver=native(variant))


@needs_library
@pytest.mark.parametrize("text", ["4g64", "2g16m"])
def test_what_is_no_number_spoils_no_other_group(text: str) -> None:
    """Where it is packed all the same."""
    weight = normal(64, 512)
    matrix = parse_precision(text).matrix("m", 64, 512)
    whole = quantize(weight, matrix, optimize=True, solver=native())
    parts = {name: part.clone() for name, part in whole.items()}
    weight[3, 5] = torch.nan
    bad = quantize_to(parts, weight, matrix, optimize=True, solver=native())
    assert bad == "m.scale"
    found = dequantize(matrix, parts, torch.float32)
    groups = 128 if matrix.meta_group_size else 1
    assert found.isnan().sum() == groups * matrix.group_size
    assert found[3, 5].isnan()
    others = ~found.isnan()
    expected = dequantize(matrix, whole, torch.float32)
    assert torch.equal(found[others], expected[others])


@needs_library
def test_groups_far_from_zero_are_not_refused() -> None:
    """hqq's zero of these lies past fp16."""
    weight = 4 + normal(8, 128, 1e-3)
    matrix = parse_precision("8g128").matrix("m", 8, 128)
    with pytest.raises(ValueError, match="zero"):
        quantize(weight, matrix, optimize=True, solver=HqqSolver())
    parts = quantize(weight, matrix, optimize=True, solver=native())
    assert torch.allclose(dequantize(matrix, parts, torch.float32), weight, rtol=1e-3)


@needs_library
def test_an_unknown_variant() -> None:
    with pytest.raises(ValueError, match="cannot run vax"):
        quantize(normal(8, 64), parse_precision("4g64").matrix("m", 8, 64),
                 optimize=True, solver=native("vax"))  # fmt: skip


def test_without_native_code_hqq_runs_and_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    chosen = choose_solver()
    assert chosen.solver.version.startswith("hqq 0.2")
    assert chosen.drawback.startswith("EXPERTD_NATIVE=0 turns native code off, so hqq's")


@needs_library
def test_native_code_is_preferred(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)
    chosen = choose_solver()
    assert isinstance(chosen.solver, NativeSolver)
    assert not chosen.drawback


def test_devices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    assert choose_solver("cuda").solver.version.endswith("on cuda")
    assert choose_solver("cuda:0").solver.version.endswith("on cuda")
    with pytest.raises(PreconditionError, match="1 CUDA devices, so there is no cuda:1"):
        choose_solver("cuda:1")
    for name in ("tpu", "cuda:x", "cpu:1", ""):
        with pytest.raises(ConfigError, match="give cpu, cuda or cuda:N"):
            choose_solver(name)
