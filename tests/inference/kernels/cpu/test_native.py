"""The native kernels against the reference, for every instruction set that this machine has."""

import ctypes
import os
import shutil
import signal
import subprocess
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from expertd.packing.quantizer import quantize
from expertd_inference.kernels.activation import Activation, ActivationKind
from expertd_inference.kernels.cpu import operations, reference, structures
from expertd_inference.kernels.cpu.library import PATH, STRUCTURES, native_library
from expertd_inference.kernels.cpu.native import MAX_SUMMED, NativeKernels, matrix_of, use_isa
from expertd_inference.kernels.cpu.reference import sum_slots
from expertd_inference.kernels.wave import ExpertsSpec, Routed, Wave
from expertd_inference.kernels.weights import QuantizedWeight
from expertd_testing.forms import is_kept, named, random_parts
from expertstore.pack.codec import dequantize
from expertstore.pack.manifest import GateOrder
from tests.inference.kernels.cpu.test_reference import Layer, routed

pytestmark = pytest.mark.skipif(
    native_library().library is None, reason=f"no native kernels: {native_library().reason}"
)

FUSED_TOKENS = 32
"""More rows of an expert or a linear layer are multiplied by torch in :func:`switched`."""
ISAS = ["portable", "avx2", "avx512", "avx512vnni", "avx512bf16"]
WHOLE_NUMBERS = ["avx2", "avx512", "avx512vnni", "avx512bf16"]
"""What multiplies bfloat16 activations as whole numbers."""
PRECISIONS = ["16", "8g128", "8g64m", "4g64", "4g16", "4g32m", "4g128", "3g64m", "3g32", "2g16m"]
PRECISIONS += ["2g64", "mxfp4", "nvfp4", "mxfp8", "fp8:32x32", "int4g32", "int8g64"]


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if use_isa(request.param) is None:
        pytest.skip(f"no {request.param} here")
    yield request.param
    use_isa(None)


def switched() -> NativeKernels:
    return NativeKernels(most_rows=lambda _, __: FUSED_TOKENS)


def spec_of(layer: Layer) -> ExpertsSpec:
    return ExpertsSpec(layer.layout, layer.gate_order, layer.gate, Activation(ActivationKind.SILU))


def inputs(tokens: int, h: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, h, generator=torch.Generator().manual_seed(1)).to(dtype)


def both(
    layer: Layer, spec: ExpertsSpec, hidden: Tensor, index: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The layer's output by the native kernels and by the reference."""
    wave = Wave(range(len(layer.records)), layer.records, layer.arena, spec)
    rows = Routed(hidden, index, weights)
    slots = rows.empty_slots()
    reference.fill_slots(slots, rows, wave)
    ours = switched().output(rows, wave)
    return ours, sum_slots(slots, hidden.dtype)


def assert_near(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    # In float32 sums in another order, and exponentials to 2 units in the last place. In half
    # precision the reference rounds its weights too, by 2^-9 (2^-12) each; what a sum of H of
    # them then is off by is that times the result's size, a few times over for the two products.
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    scale = expected.float().abs().max().item()
    assert (ours.float() - expected.float()).abs().max().item() <= tolerance * max(scale, 1e-3)


CASES = [  # tokens, k, experts, H, I
    (1, 2, 4, 128, 64),  # one token
    (3, 2, 4, 320, 192),  # columns that no block of 256 divides
    (11, 3, 8, 128, 128),  # more tokens of an expert than share a decoding: 8, 4, 2 and 1 do
    (FUSED_TOKENS * 3, 2, 4, 128, 64),  # more tokens of an expert than are computed fused
]
DTYPES = [torch.bfloat16, torch.float16, torch.float32]


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_layer(isa: str, precision: str, dtype: torch.dtype) -> None:
    for tokens, k, num_experts, h, i in CASES:
        if "128" in precision:
            h, i = -(-h // 128) * 128, -(-i // 128) * 128
        layer = layer_of(num_experts, h, i, precision, dtype)
        index, weights = routed(tokens, k, num_experts)
        ours, expected = both(layer, spec_of(layer), inputs(tokens, h, dtype), index, weights)
        assert ours.dtype == dtype
        assert_near(ours, expected, dtype)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("precision", ["8g64", "4g64", "4g32m", "3g64m", "3g32", "2g16m"])
def test_weights_of_unusual_size(isa: str, precision: str) -> None:
    """Their scales are bfloat16: of an expert's, of linear layers', alone and of meta groups."""
    layer = Layer(4, 128, 64, precision=precision, dtype=torch.bfloat16, sizes=(2.0**20, 2.0**-40))
    for tokens in (1, 3, FUSED_TOKENS * 3):
        index, weights = routed(tokens, 2, 4)
        hidden = inputs(tokens, 128, torch.bfloat16)
        assert_near(*both(layer, spec_of(layer), hidden, index, weights), torch.bfloat16)
    weight = quantized(64, 256, precision, size=2.0**-24)
    x = inputs(2, 256, torch.bfloat16)
    exact = x.double() @ dequantize(weight.matrix, weight.parts, torch.float32).double().T
    error = (NativeKernels().linear(x, weight).double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 + 2e-4 * 2**-24).all()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("columns", [16, 48, 112, 2064])
@pytest.mark.parametrize("precision", ["8g16", "4g16m", "3g16", "2g16m", "nvfp4", "fp8:3x4096"])
def test_columns_that_no_register_divides(isa: str, columns: int, precision: str) -> None:
    # 2064 = 2 * 1024 + 16: meta groups of 129 groups a row, which begin anywhere in a register.
    weight = quantized(128, columns, precision)
    for rows in (1, 3):
        x = inputs(rows, columns, torch.bfloat16)
        assert_exact(NativeKernels().linear(x, weight), x, weight)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("precision", ["8g64", "4g64", "4g128", "4g32m", "3g64m", "2g16m", "2g64"])
def test_linear(isa: str, precision: str) -> None:
    weight = quantized(64, 4224, precision)  # more columns than have their scales decoded at once
    for shape in ((4224,), (1, 4224), (2, 3, 4224), (FUSED_TOKENS + 1, 4224)):
        x = torch.randn(shape, generator=torch.Generator().manual_seed(3)).bfloat16()
        ours = switched().linear(x, weight)
        assert ours.shape == (*shape[:-1], 64)
        if x.numel() // 4224 <= FUSED_TOKENS:
            assert_exact(ours, x, weight)
        else:  # dequantized as the reference does it
            torch.testing.assert_close(ours, reference.linear(x, weight), atol=0.02, rtol=0.02)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize(
    "precision", ["8g64", "4g64", "3g64m", "2g16m", "mxfp4", "nvfp4", "fp8:9x128"]
)
def test_float16_keeps_its_digits(isa: str, precision: str) -> None:
    # A bfloat16 has three digits less, and so a result that is off by eight times as much.
    weight = quantized(64, 1024, precision)
    x = inputs(5, 1024, torch.float16)
    x[:, ::16] = 3.998  # which is nearer to 4 than bfloat16s are
    exact = x.double() @ dequantize(weight.matrix, weight.parts, torch.float32).double().T
    for rows in (1, 5):
        error = (NativeKernels().linear(x[:rows], weight).double() - exact[:rows]).abs()
        assert (error <= exact[:rows].abs() * 2**-11 + 2e-4).all()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("precision", ["8g64", "4g64", "4g16", "3g64", "2g16"])
def test_small_activations_beside_large_ones(isa: str, precision: str) -> None:
    # Some kernels take a group's activations as multiples of a 32,768th of its largest.
    weight = quantized(64, 256, precision)
    x = inputs(3, 256, torch.bfloat16)
    x[:, ::64] *= 1000
    exact = x.double() @ dequantize(weight.matrix, weight.parts, torch.float32).double().T
    rounded = dequantize(weight.matrix, weight.parts, torch.float32).double().abs().sum(1)
    allowed = exact.abs() * 2**-8 + rounded * x.abs().max().item() * 2**-16
    assert ((NativeKernels().linear(x, weight).double() - exact).abs() <= allowed).all()
    # Without the large ones they count as always.
    x[:, ::64] = 0
    assert_exact(NativeKernels().linear(x, weight), x, weight)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("precision", ["8g64", "4g64"])
def test_the_largest_activation_has_all_digits(isa: str, precision: str) -> None:
    # 32,640 in 16-bit fixed point, one more than two signed bytes hold.
    weight = quantized(64, 256, precision)
    x = torch.full((2, 256), 2 - 2**-7, dtype=torch.bfloat16)
    x[1] *= -1
    assert_exact(NativeKernels().linear(x, weight), x, weight)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("precision", ["8g64", "4g64", "3g64", "2g16"])
def test_a_power_of_two_changes_no_digit(isa: str, precision: str) -> None:
    weight = quantized(64, 256, precision)
    x = inputs(2, 256, torch.bfloat16)
    expected = NativeKernels().linear(x, weight)
    for power in (2.0**-60, 2.0**60):
        assert torch.equal(NativeKernels().linear(x * power, weight), expected * power)
    none = NativeKernels().linear(x * 0, weight)
    assert torch.equal(none, torch.zeros_like(none))


ROW_COUNTS = (1, 2, 3, 4, 5, 7, 8, 9, 16, 23, 64, 65, 130)
FIXED = ["8g128", "8g16m", "4g64", "4g16", "4g32m", "4g128", "3g64m", "3g32", "2g16m", "mxfp4"]
FIXED += ["nvfp4", "int4g32", "int3g64"]
"""What is multiplied with activations in fixed point."""
SCHEMES = [*FIXED, "mxfp8", "fp8:32x32", "fp8:5x128", "fp8:16x4096"]
"""The last in several ways: two scales in a register, one, and one for a row."""


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("activations", [16, 8])
@pytest.mark.parametrize("precision", SCHEMES)
def test_bits_do_not_depend_on_the_number_of_rows(
    isa: str, activations: int, precision: str
) -> None:
    # Units that no tile of 16 divides, and the other way round; each with a type of its own.
    for out, columns, dtype in ((72, 384, torch.bfloat16), (272, 128, torch.float16)):
        weight = quantized(out, columns, precision)
        x = inputs(max(ROW_COUNTS), columns, dtype)
        exact = NativeKernels(activations=activations, exact=True)
        expected = exact.linear(x, weight)
        for count in ROW_COUNTS:
            for first in {0, len(x) - count}:
                ours = exact.linear(x[first : first + count], weight)
                assert torch.equal(ours, expected[first : first + count])
        # Without it one row alone may have others, and no other number of rows.
        usual = NativeKernels(activations=activations)
        assert torch.equal(usual.linear(x[:3], weight), expected[:3])


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("activations", [16, 8])
@pytest.mark.parametrize("precision", ["4g64", "3g64m", "2g16m", "mxfp4", "nvfp4", "mxfp8"])
def test_bits_of_experts_do_not_depend_on_the_other_tokens(
    isa: str, activations: int, precision: str
) -> None:
    layer = layer_of(4, 128, 64, precision, torch.bfloat16)
    hidden = inputs(80, 128, torch.bfloat16)
    index, weights = routed(80, 2, 4)
    kernels = NativeKernels(activations=activations, exact=True)

    def output(first: int, last: int) -> Tensor:
        some = Routed(hidden[first:last], index[first:last], weights[first:last])
        return kernels.output(some, Wave(range(4), layer.records, layer.arena, spec_of(layer)))

    threads = torch.get_num_threads()
    try:
        for num_threads in (1, 2):
            torch.set_num_threads(num_threads)
            expected = output(0, 80)
            for first, last in ((0, 1), (79, 80), (3, 5), (10, 17), (20, 60)):
                assert torch.equal(output(first, last), expected[first:last])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("activations", [16, 8])
@pytest.mark.parametrize("precision", [*FIXED, "8g16", "2g64", "3g128"])
def test_instruction_sets_that_multiply_whole_numbers_agree(
    activations: int, precision: str
) -> None:
    """They add up the same integers and then the same floats, each its own way."""
    kernels = NativeKernels(activations=activations, exact=True)
    # Units that no tile divides; groups that no strip of 16 does, and meta groups that cross rows.
    largest = quantized(72, 384, precision)
    largest.parts["w.q"].fill_(0x77 if precision in {"mxfp4", "nvfp4"} else 0xFF)  # of E2M1, 6
    shapes = ((72, 384, 1.0), (272, 128 * 19, 1.0), (128, 2048, 2.0**-24))
    for weight in (largest, *(quantized(*shape[:2], precision, shape[2]) for shape in shapes)):
        columns = weight.matrix.in_features
        x = inputs(9, columns, torch.bfloat16)
        x[1, ::64] *= 1000
        x[2] *= 0
        x[3] *= 2.0**-120
        x[4, 5] = float("inf")
        x[5], x[6] = 1, -1  # all of them a group's largest
        results = {}
        try:
            for isa in WHOLE_NUMBERS:
                if use_isa(isa) is not None:
                    results[isa] = kernels.linear(x, weight)
        finally:
            use_isa(None)
        if not results:
            pytest.skip(f"none of {', '.join(WHOLE_NUMBERS)} here")
        first = next(iter(results.values()))
        assert first[4].isnan().all()
        for result in results.values():
            torch.testing.assert_close(result, first, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_what_the_reference_computes_is_exact_too(dtype: torch.dtype) -> None:
    """Of an activation or a dtype that native kernels do not know."""
    layer = layer_of(4, 320, 192, "4g64", torch.float32)
    spec = ExpertsSpec(layer.layout, layer.gate_order, layer.gate)
    weight = quantized(96, 1024, "4g64")
    hidden, x = inputs(80, 320, dtype), inputs(80, 1024, torch.float64)
    index, weights = routed(80, 2, 4)

    def computed(kernels: NativeKernels, first: int, last: int) -> list[Tensor]:
        some = Routed(hidden[first:last], index[first:last], weights[first:last])
        wave = Wave(range(4), layer.records, layer.arena, spec)
        return [kernels.output(some, wave), kernels.linear(x[first:last], weight)]

    exact, usual = NativeKernels(exact=True), NativeKernels()
    assert not exact.knows(spec, dtype)
    expected = computed(exact, 0, 80)
    for ours, theirs in zip(expected, computed(usual, 0, 80), strict=True):
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-4)
    for first, last in ((0, 1), (79, 80), (3, 5), (10, 17), (20, 60)):
        for ours, whole in zip(computed(exact, first, last), expected, strict=True):
            assert torch.equal(ours, whole[first:last])


@pytest.mark.parametrize("isa", WHOLE_NUMBERS, indirect=True)
@pytest.mark.parametrize("precision", FIXED)
def test_the_error_of_one_plane_of_activations(isa: str, precision: str) -> None:
    weight = quantized(64, 1024, precision)
    x = inputs(16, 1024, torch.bfloat16)
    exact = x.double() @ dequantize(weight.matrix, weight.parts, torch.float32).double().T

    def error(activations: int) -> float:
        ours = NativeKernels(activations=activations).linear(x, weight).double()
        return ((ours - exact).square().mean() / exact.square().mean()).sqrt().item()

    # A value is off by a unit over the root of 12 in the square mean, and a unit is a 127th of the
    # group's largest, which is 1.8 (16 values) to 2.7 (128) times the square mean. What is left of
    # two planes is the rounding of the result: 2^-9 over the root of 3, uniformly in the mantissa.
    assert 1.8 / 127 / 12**0.5 * 0.8 < error(8) < 2.7 / 127 / 12**0.5 * 1.2
    assert error(16) < 1.8e-3


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("kind", list(ActivationKind))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations(isa: str, kind: ActivationKind, dtype: torch.dtype) -> None:
    activation = (
        Activation(kind, 1.702, 1.5) if kind is ActivationKind.GPT_OSS else Activation(kind)
    )
    order = GateOrder.INTERLEAVED if kind is ActivationKind.GPT_OSS else GateOrder.CONCATENATED
    gated = kind is not ActivationKind.RELU2
    layer = Layer(
        4, 64, 64, precision="4g64", dtype=dtype, bias=True, gate_order=order, gated=gated
    )

    def apply_gate(gate_up: Tensor) -> Tensor:
        if not gated:
            return functional.relu(gate_up).square()
        if order is GateOrder.INTERLEAVED:
            return GATES[kind](gate_up[..., ::2], gate_up[..., 1::2])
        return GATES[kind](*gate_up.chunk(2, dim=-1))

    spec = ExpertsSpec(layer.layout, order, apply_gate, activation)
    index, weights = routed(5, 2, 4)
    # Ten times as large as usual: exponentials of large numbers, and gates beyond their limit.
    ours, expected = both(layer, spec, inputs(5, 64, dtype) * 10, index, weights)
    assert_near(ours, expected, dtype)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("precision", ["16", "8g32", "3g32m", "2g16m", "mxfp4"])
def test_without_a_gate(isa: str, precision: str) -> None:
    for tokens, k, num_experts, h, i in CASES:
        # Down has more columns than half of the rows of up.
        layer = Layer(num_experts, h, i + 32, precision=precision, bias=True, gated=False)
        spec = ExpertsSpec(
            layer.layout, layer.gate_order, layer.gate, Activation(ActivationKind.RELU2)
        )
        index, weights = routed(tokens, k, num_experts)
        ours, expected = both(layer, spec, inputs(tokens, h, torch.bfloat16), index, weights)
        assert_near(ours, expected, torch.bfloat16)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_bits_depend_on_nothing_but_the_expert(isa: str) -> None:
    layer = layer_of(8, 128, 128, "4g64", torch.bfloat16)
    spec, kernels = spec_of(layer), NativeKernels()
    hidden = inputs(20, 128, torch.bfloat16)
    rows = Routed(hidden, *routed(20, 3, 8))
    threads = torch.get_num_threads()
    results = []
    try:
        for num_threads in (1, 2, 5):
            torch.set_num_threads(num_threads)
            for waves in (
                [list(range(8))],
                [[0, 1], [2, 3, 4], [5, 6, 7]],
                [[7], [3, 0], [1, 2, 4, 5, 6]],
            ):
                slots = rows.empty_slots()
                for experts in waves:
                    records = [layer.records[e] for e in experts]
                    kernels.fill_slots(slots, rows, Wave(experts, records, layer.arena, spec))
                results.append(sum_slots(slots, hidden.dtype))
            results.append(kernels.output(rows, Wave(range(8), layer.records, layer.arena, spec)))
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results)


@pytest.mark.parametrize("k", [1, 2, 8, MAX_SUMMED, MAX_SUMMED + 1])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_sum_is_torch_s(k: int, dtype: torch.dtype) -> None:
    layer = layer_of(MAX_SUMMED + 1, 64, 64, "4g64", torch.bfloat16)
    for tokens in (1, 3):
        hidden = inputs(tokens, 64, torch.bfloat16)
        index, weights = routed(tokens, k, MAX_SUMMED + 1)
        rows = Routed(hidden, index, weights.to(dtype))
        wave = Wave(range(MAX_SUMMED + 1), layer.records, layer.arena, spec_of(layer))
        slots = rows.empty_slots()
        NativeKernels().fill_slots(slots, rows, wave)
        summed = NativeKernels().output(rows, wave)
        assert torch.equal(summed, sum_slots(slots, hidden.dtype))


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("precision", ["16", "8g64", "4g64", "2g16m", "mxfp4", "nvfp4", "mxfp8"])
def test_nan_stays_in_its_token(isa: str, precision: str) -> None:
    layer = layer_of(4, 64, 64, precision, torch.bfloat16)
    hidden = inputs(3, 64, torch.bfloat16)
    hidden[1, 5] = float("nan")
    index, weights = routed(3, 2, 4)
    ours, expected = both(layer, spec_of(layer), hidden, index, weights)
    assert torch.equal(ours.isnan(), expected.isnan())
    assert ours[1].isnan().all()
    assert not ours[[0, 2]].isnan().any()


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_every_code_of_a_kept_form(isa: str, dtype: torch.dtype) -> None:
    """With every scale of a byte: a one among zeros picks weights, and what is none is NaN.

    Subnormal numbers are the smallest: a processor may take them for 0.
    """
    every = torch.arange(256, dtype=torch.uint8)
    for precision in ("mxfp4", "nvfp4", "mxfp8", "fp8:1x64"):
        weight = quantized(512, 64, precision)
        weight.parts["w.q"].copy_(every.repeat(2).view(-1, 1)[: len(weight.parts["w.q"])])
        scale = weight.parts["w.scale"]
        if scale.dtype == torch.uint8:
            # Not those whose numbers are below bfloat16's normal ones, or above its largest.
            lowest, highest = (0, 255) if precision == "nvfp4" else (32, 240)
            scale.copy_(every.clamp(lowest, highest).repeat(2).roll(7).view(-1, 1))
            scale[300] = 255
        for group in (1, 5):
            x = torch.eye(64, dtype=dtype)[:group]
            ours = NativeKernels().linear(x, weight)
            expected = dequantize(weight.matrix, weight.parts, torch.float32)[:, :group].T.to(dtype)
            assert expected.isnan().any()
            torch.testing.assert_close(ours, expected, rtol=2**-8, atol=0, equal_nan=True)


def test_blocks_that_kernels_do_not_know_are_the_reference_s() -> None:
    """Of 48 columns a register would have three scales."""
    weight = quantized(64, 128, "fp8:1x48")
    assert matrix_of(weight) is None
    x = inputs(3, 128, torch.bfloat16)
    assert torch.equal(NativeKernels().linear(x, weight), reference.linear(x, weight))


def test_slots_without_an_expert_are_zero() -> None:
    # Index num_experts is "none" where tokens are spread over devices.
    layer = layer_of(4, 64, 64, "4g64", torch.bfloat16)
    index = torch.tensor([[0, 4], [4, 4], [2, 1]])
    ours, expected = both(
        layer, spec_of(layer), inputs(3, 64, torch.bfloat16), index, torch.full((3, 2), 0.5)
    )
    assert torch.equal(ours[1], torch.zeros(64, dtype=torch.bfloat16))
    assert_near(ours, expected, torch.bfloat16)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "chosen",
    [[[0, 3, 5]], [[3, 5, 3]], [[0, 3, 5], [5, 1, 2]], [[1, 2, 4], [4, 2, 1], [1, 1, 2]]],
    ids=str,
)  # of one row, one of them twice; of several rows, few experts in all
def test_a_call_made_before(chosen: list[list[int]], dtype: torch.dtype) -> None:
    layer = layer_of(6, 128, 64, "4g64", dtype)
    kernels, num, spec = NativeKernels(), len(chosen), spec_of(layer)
    rows = Routed(
        inputs(num, 128, dtype), torch.zeros(num, 3, dtype=torch.int64), torch.rand(num, 3)
    )
    prepared = kernels.prepare(rows, spec)
    assert prepared is not None
    # Tensors that stay where they are, with other values each time.
    for values in ([[0, 1, 2]] * num, chosen, [[4, 2, 1]] * num, chosen):
        rows.index.copy_(torch.tensor(values))
        rows.rows.mul_(1.5)
        experts = sorted({expert for row in values for expert in row})
        wave = Wave(experts, [layer.records[expert] for expert in experts], layer.arena, spec)
        assert torch.equal(kernels.output(rows, wave, prepared), kernels.output(rows, wave))


def test_not_every_call_can_be_made_before() -> None:
    layer = layer_of(6, 128, 64, "4g64", torch.bfloat16)
    index = torch.zeros(1, 3, dtype=torch.int64)
    for rows in (
        Routed(inputs(FUSED_TOKENS + 1, 128, torch.bfloat16), *routed(FUSED_TOKENS + 1, 3, 6)),
        Routed(inputs(1, 128, torch.bfloat16), index.int(), torch.rand(1, 3)),
        Routed(inputs(2, 128, torch.bfloat16)[:, ::2], index, torch.rand(1, 3)),
        Routed(inputs(1, 128, torch.float64), index, torch.rand(1, 3)),
    ):
        assert switched().prepare(rows, spec_of(layer)) is None


def test_an_unknown_activation_is_the_reference_s() -> None:
    layer = layer_of(4, 64, 64, "4g64", torch.bfloat16)
    spec = ExpertsSpec(layer.layout, layer.gate_order, lambda gate_up: gate_up.chunk(2, -1)[0])
    index, weights = routed(3, 2, 4)
    ours, expected = both(layer, spec, inputs(3, 64, torch.bfloat16), index, weights)
    assert torch.equal(ours, expected)


def test_hidden_of_another_size_is_refused() -> None:
    layer = layer_of(4, 64, 64, "4g64", torch.bfloat16)
    with pytest.raises(RuntimeError, match="do not fit"):
        NativeKernels().output(
            Routed(inputs(1, 7, torch.bfloat16), torch.tensor([[0, 1]]), torch.ones(1, 2)),
            Wave([0, 1], layer.records[:2], layer.arena, spec_of(layer)),
        )


@pytest.fixture
def two_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_forked_child_has_threads_of_its_own() -> None:
    weight = quantized(512, 512, "4g64")
    x = inputs(1, 512, torch.bfloat16)
    expected = NativeKernels().linear(x, weight)  # the parent's threads now run
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # forking a process with threads
        child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends a child that waits for threads which it does not have
        equal = torch.equal(NativeKernels().linear(x, weight), expected)
        # Alone it would give the same, slower.
        threads = len(list(Path("/proc/self/task").iterdir()))
        os._exit(0 if equal and threads > 1 else 1)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0


def test_callers_from_several_threads_take_turns() -> None:
    weight = quantized(256, 512, "4g64")
    rows = [inputs(1, 512, torch.bfloat16) * scale for scale in range(1, 5)]
    kernels = NativeKernels()
    expected = [kernels.linear(x, weight) for x in rows]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(20):
            results = list(pool.map(lambda x: kernels.linear(x, weight), rows))
            assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


def test_no_function_of_a_variant_is_called_by_another() -> None:
    # A function that two variants share by name would run one's instructions where they are not.
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    lines = subprocess.run(
        ["nm", "-C", PATH], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    weak = [line for line in lines if " W " in line and ("generic" in line or "Variant" in line)]
    assert not weak


GATES = {
    ActivationKind.SILU: lambda gate, up: functional.silu(gate) * up,
    ActivationKind.GELU: lambda gate, up: functional.gelu(gate) * up,
    ActivationKind.GELU_TANH: lambda gate, up: functional.gelu(gate, approximate="tanh") * up,
    ActivationKind.RELU: lambda gate, up: functional.relu(gate) * up,
    ActivationKind.GPT_OSS: lambda gate, up: (
        (up.clamp(-1.5, 1.5) + 1) * (gate.clamp(max=1.5) * (gate.clamp(max=1.5) * 1.702).sigmoid())
    ),
}


def quantized(rows: int, columns: int, precision: str, size: float = 1) -> QuantizedWeight:
    matrix = named(precision, "w", rows, columns)
    if is_kept(matrix):
        # Zeros that are no part have bfloat16 scales here, others fp16 ones.
        parts = random_parts(matrix, torch.Generator().manual_seed(2), "BF16")
        return QuantizedWeight(matrix, parts)
    weight = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    return QuantizedWeight(matrix, quantize(weight * size / columns**0.5, matrix, optimize=False))


def assert_exact(ours: Tensor, x: Tensor, weight: QuantizedWeight) -> None:
    # Against float64 of the weights before any rounding: what is left is the result's own
    # rounding to bfloat16, half a unit in the last of 8 bits, and a float32 sum's.
    exact = x.double() @ dequantize(weight.matrix, weight.parts, torch.float32).double().T
    error = (ours.double() - exact).abs()
    assert (error <= exact.abs() * 2**-8 + 2e-4).all()


_LAYERS: dict[tuple[object, ...], Layer] = {}


def layer_of(num_experts: int, h: int, i: int, precision: str, dtype: torch.dtype) -> Layer:
    key = (num_experts, h, i, precision, dtype)
    if key not in _LAYERS:
        _LAYERS[key] = Layer(num_experts, h, i, precision=precision, dtype=dtype, bias=True)
    return _LAYERS[key]


def test_sizes_of_all_structures_are_compared() -> None:
    """Of those that native code exports, and of all that Python has."""
    if shutil.which("nm") is None:
        pytest.skip("no nm")
    symbols = subprocess.run(["nm", "-D", PATH], capture_output=True, text=True, check=True).stdout
    exported = {name for name in symbols.split() if name.startswith("expertd_size_of_")}
    assert exported == {f"expertd_size_of_{name}" for name in STRUCTURES}
    declared = {
        each
        for module in (operations, structures)
        for each in vars(module).values()
        if isinstance(each, type) and issubclass(each, ctypes.Structure)
    }
    assert declared - {ctypes.Structure} == set(STRUCTURES.values())
    sources = Path(operations.__file__).parents[2].rglob("*.py")
    elsewhere = {path.name for path in sources if "(ctypes.Structure)" in path.read_text()}
    assert elsewhere == {"operations.py", "structures.py"}
