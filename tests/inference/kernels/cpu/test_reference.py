"""The reference against a formula that anybody can read, in float64."""

import ctypes
import mmap

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from expertd.packing.quantizer import quantize
from expertd_inference.kernels.arena import ArenaTensors
from expertd_inference.kernels.cpu.reference import fill_slots, sum_slots
from expertd_inference.kernels.wave import ExpertsSpec, Routed, Wave
from expertd_testing.forms import is_kept, named, random_parts
from expertstore.pack.codec import TORCH_DTYPES, dequantize
from expertstore.pack.layout import DOWN, GATE_UP, UP, record_layout
from expertstore.pack.manifest import GateOrder


class Layer:
    """``num_experts`` random experts of hidden size ``h`` and intermediate ``i`` in an arena."""

    def __init__(
        self,
        num_experts: int,
        h: int,
        i: int,
        *,
        precision: str = "16",
        bias: bool = False,
        gate_order: GateOrder = GateOrder.CONCATENATED,
        dtype: torch.dtype = torch.bfloat16,
        sizes: tuple[float, float] = (1, 1),
        seed: int = 0,
        gated: bool = True,
    ) -> None:
        """``sizes`` of the weights of gate_up and down beside usual ones; BF16 scales if not 1."""
        generator = torch.Generator().manual_seed(seed)
        name = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}[dtype]
        inward = named(precision, *((GATE_UP, 2 * i) if gated else (UP, i)), h)
        matrices = (inward, named(precision, DOWN, h, i))
        scales = ["F16" if size == 1 else "BF16" for size in sizes]
        self.layout = record_layout(matrices, name, has_bias=bias, scales=scales)
        # A page before the first record: an offset of 0 hides its misuse.
        self.records = [4096 + e * self.layout.record_bytes for e in range(num_experts)]
        self.memory = mmap.mmap(-1, 4096 + num_experts * self.layout.record_bytes)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.arena = ArenaTensors(address, len(self.memory))
        self.weights: list[dict[str, Tensor]] = []
        self.gate_order = gate_order
        for record in self.records:
            weights: dict[str, Tensor] = {}
            for matrix, size in zip(matrices, sizes, strict=True):
                shape = (matrix.out_features, matrix.in_features)
                weight = torch.randn(shape, generator=generator).mul(size / shape[1] ** 0.5)
                weight = weight.to(dtype)
                if is_kept(matrix):
                    parts = random_parts(matrix, generator)
                elif matrix.bits:
                    parts = quantize(weight, matrix, optimize=False)
                else:
                    parts = {f"{matrix.name}.weight": weight}
                weights[matrix.name] = dequantize(matrix, parts, dtype)
                if bias:
                    parts[f"{matrix.name}.bias"] = weights[f"{matrix.name}.bias"] = torch.randn(
                        shape[0], generator=generator
                    ).to(dtype)
                for part in self.layout.parts:
                    if part.name in parts:
                        tensor = parts[part.name].to(TORCH_DTYPES[part.dtype]).contiguous()
                        self.arena.part(record, part).copy_(tensor.view(part.shape))
            self.weights.append(weights)

    def run(self, hidden: Tensor, index: Tensor, weights: Tensor, waves: list[list[int]]) -> Tensor:
        spec = ExpertsSpec(self.layout, self.gate_order, self.gate)
        routed = Routed(hidden, index, weights)
        slots = routed.empty_slots()
        for experts in waves:
            records = [self.records[e] for e in experts]
            fill_slots(slots, routed, Wave(experts, records, self.arena, spec))
        return sum_slots(slots, hidden.dtype)

    def gate(self, gate_up: Tensor) -> Tensor:
        if not self.layout.is_gated:
            return functional.relu(gate_up).square()
        if self.gate_order is GateOrder.INTERLEAVED:
            gate, up = gate_up[..., ::2], gate_up[..., 1::2]
        else:
            gate, up = gate_up.chunk(2, dim=-1)
        return functional.silu(gate) * up

    def expected(self, hidden: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros(hidden.shape, dtype=torch.float64)
        for t in range(hidden.shape[0]):
            for k in range(index.shape[1]):
                if index[t, k] >= len(self.weights):
                    continue
                expert = {n: w.double() for n, w in self.weights[index[t, k]].items()}
                name = self.layout.inward.name
                inner = expert[name] @ hidden[t].double()
                inner = inner + expert.get(f"{name}.bias", torch.zeros(1))
                if self.layout.is_gated:
                    gate, up = inner.chunk(2)
                    inner = functional.silu(gate) * up
                else:
                    inner = functional.relu(inner).square()
                result = expert["down"] @ inner
                result = result + expert.get("down.bias", torch.zeros(1))
                out[t] += result * weights[t, k].double()
        return out


def routed(tokens: int, k: int, num_experts: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, num_experts, generator=generator)
    weights, index = scores.topk(k, dim=-1)
    return index, weights / weights.sum(dim=-1, keepdim=True)


Case = tuple[int, int, int, int, int]

SHAPES: dict[str, Case] = {  # tokens, k, experts, H, I
    "one token": (1, 2, 4, 64, 64),
    "one token, one expert": (1, 1, 1, 64, 64),
    "all experts of all tokens": (5, 4, 4, 64, 64),
    "sizes that no vector register divides": (7, 3, 8, 37, 21),
    "more experts than tokens": (2, 2, 64, 64, 32),
    "prefill": (67, 2, 8, 128, 96),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES.keys())
@pytest.mark.parametrize("order", [*GateOrder, "no gate"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
def test_formula(shape: Case, order: GateOrder | str, bias: bool) -> None:
    tokens, k, num_experts, h, i = shape
    gated = isinstance(order, GateOrder)
    known = order if isinstance(order, GateOrder) else GateOrder.CONCATENATED
    layer = Layer(num_experts, h, i, bias=bias, gate_order=known, dtype=torch.float32, gated=gated)
    hidden = torch.randn(tokens, h, generator=torch.Generator().manual_seed(1))
    index, weights = routed(tokens, k, num_experts)
    out = layer.run(hidden, index, weights, [list(range(num_experts))])
    assert out.dtype == torch.float32
    # Sums of at most 128 products of order 1 / sqrt(128), in float32.
    torch.testing.assert_close(
        out.double(), layer.expected(hidden, index, weights), atol=2e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    layer = Layer(8, 128, 96, dtype=dtype)
    hidden = torch.randn(20, 128, generator=torch.Generator().manual_seed(1)).to(dtype)
    index, weights = routed(20, 2, 8)
    out = layer.run(hidden, index, weights, [list(range(8))])
    assert out.dtype == dtype
    # Results of order 0.5 that were rounded to 8 (or 11) bits four times.
    tolerance = 0.02 if dtype is torch.bfloat16 else 0.003
    torch.testing.assert_close(
        out.double(), layer.expected(hidden, index, weights), atol=tolerance, rtol=tolerance
    )


@pytest.mark.parametrize("precision", ["8g64", "4g64", "4g32m", "3g64m", "2g16m", "mxfp4"])
def test_quantized(precision: str) -> None:
    layer = Layer(4, 128, 128, precision=precision, bias=True)
    hidden = torch.randn(9, 128, generator=torch.Generator().manual_seed(1))
    index, weights = routed(9, 2, 4)
    out = layer.run(hidden, index, weights, [[0, 1, 2, 3]])
    # Against the dequantized weights, which were rounded to bf16 there and not here.
    torch.testing.assert_close(
        out.double(), layer.expected(hidden, index, weights), atol=0.02, rtol=0.02
    )


def test_waves_and_repetitions_do_not_matter() -> None:
    layer = Layer(8, 64, 32)
    hidden = torch.randn(20, 64, generator=torch.Generator().manual_seed(1)).bfloat16()
    index, weights = routed(20, 3, 8)
    whole = layer.run(hidden, index, weights, [list(range(8))])
    for waves in ([[0, 1], [2, 3, 4], [5, 6, 7]], [[7], [3], [0, 1, 2, 4, 5, 6]]):
        assert torch.equal(layer.run(hidden, index, weights, waves), whole)
    assert torch.equal(layer.run(hidden, index, weights, [list(range(8))] * 3), whole)


def test_slots_without_an_expert_are_zero() -> None:
    # Index num_experts is "none" where tokens are spread over devices.
    layer = Layer(4, 64, 32, dtype=torch.float32)
    hidden = torch.randn(3, 64, generator=torch.Generator().manual_seed(1))
    index = torch.tensor([[0, 4], [4, 4], [2, 1]])
    weights = torch.full((3, 2), 0.5)
    out = layer.run(hidden, index, weights, [[0, 1, 2, 3]])
    assert torch.equal(out[1], torch.zeros(64))
    torch.testing.assert_close(
        out.double(), layer.expected(hidden, index, weights), atol=1e-5, rtol=1e-5
    )


def test_the_arena_is_not_copied() -> None:
    layer = Layer(2, 64, 32)
    part = layer.layout.part("gate_up.weight")
    tensor = layer.arena.part(layer.records[1], part)
    assert tensor.data_ptr() == layer.arena.address + layer.records[1] + part.offset
    assert tensor.shape == (64, 64)
    assert tensor.is_contiguous()
