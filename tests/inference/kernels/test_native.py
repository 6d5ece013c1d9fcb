"""The native kernels against the reference, for every instruction set that this machine has."""

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from expertd_inference.activation import Activation, ActivationKind
from expertd_inference.kernels import reference
from expertd_inference.kernels.native import FUSED_TOKENS, NativeKernels, use_isa
from expertd_inference.kernels.native_library import native_library
from expertd_inference.kernels.reference import ExpertsSpec, empty_slots, sum_slots
from tests.inference.kernels.test_reference import Layer, routed

pytestmark = pytest.mark.skipif(
    native_library().library is None, reason=f"no native kernels: {native_library().reason}"
)

ISAS = ["portable", "avx2", "avx512", "avx512bf16"]
PRECISIONS = ["16", "8g128", "8g64m", "4g64", "4g16", "4g32m", "4g128", "3g64m", "3g32", "2g16m"]
PRECISIONS += ["2g64", "mxfp4"]


@pytest.fixture
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    if use_isa(request.param) is None:
        pytest.skip(f"no {request.param} here")
    yield request.param
    use_isa(None)


def spec_of(layer: Layer) -> ExpertsSpec:
    return ExpertsSpec(layer.layout, layer.gate_order, layer.gate, Activation(ActivationKind.SILU))


def inputs(tokens: int, h: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(tokens, h, generator=torch.Generator().manual_seed(1)).to(dtype)


def both(
    layer: Layer, spec: ExpertsSpec, hidden: Tensor, index: Tensor, weights: Tensor
) -> tuple[Tensor, Tensor]:
    """The layer's output by the native kernels and by the reference."""
    experts = list(range(len(layer.records)))
    arguments = {"experts": experts, "records": layer.records, "arena": layer.arena, "spec": spec}
    slots = empty_slots(hidden, weights)
    reference.fill_slots(slots, hidden, index, weights, **arguments)
    ours = NativeKernels().output(hidden, index, weights, **arguments)
    return ours, sum_slots(slots, hidden.dtype)


def assert_near(ours: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    # In float32 sums in another order, and exponentials to 2 units in the last place. In half
    # precision the reference rounds its weights too, by 2^-9 (2^-12) each; what a sum of H of
    # them then is off by is that times the result's size, a few times over for the two products.
    tolerance = {torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    scale = expected.float().abs().max().item()
    assert (ours.float() - expected.float()).abs().max().item() <= tolerance * max(scale, 1e-3)


CASES = {  # tokens, k, experts, H, I
    "one token": (1, 2, 4, 128, 64),
    "columns that no block divides": (3, 2, 4, 320, 192),
    "more tokens than share a decoding": (7, 3, 8, 128, 128),
    "an expert with more than are fused": (FUSED_TOKENS * 3, 2, 4, 128, 64),
}


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_layer(isa: str, precision: str, dtype: torch.dtype, case: tuple[int, ...]) -> None:
    tokens, k, num_experts, h, i = case
    if "128" in precision:
        h, i = -(-h // 128) * 128, -(-i // 128) * 128
    layer = layer_of(num_experts, h, i, precision, dtype)
    index, weights = routed(tokens, k, num_experts)
    ours, expected = both(layer, spec_of(layer), inputs(tokens, h, dtype), index, weights)
    assert ours.dtype == dtype
    assert_near(ours, expected, dtype)


_LAYERS: dict[tuple[object, ...], Layer] = {}


def layer_of(num_experts: int, h: int, i: int, precision: str, dtype: torch.dtype) -> Layer:
    key = (num_experts, h, i, precision, dtype)
    if key not in _LAYERS:
        _LAYERS[key] = Layer(num_experts, h, i, precision=precision, dtype=dtype, bias=True)
    return _LAYERS[key]
