"""Random experts of one layer in a device cache, and the reference's answer for them."""

import ctypes
import mmap
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional

from expertd_inference.kernels.activation import Activation, ActivationKind
from expertd_inference.kernels.arena import ArenaTensors
from expertd_inference.kernels.cpu.reference import fill_slots
from expertd_inference.kernels.wave import CachedWave, ExpertsSpec, Routed, Wave
from expertd_testing import forms
from expertd_testing.forms import is_kept
from expertstore.pack.codec import TORCH_DTYPES
from expertstore.pack.layout import Matrix, matrix_parts, record_layout
from expertstore.pack.manifest import GateOrder

SILU = Activation(ActivationKind.SILU)
NAMES = {torch.bfloat16: "BF16", torch.float32: "F32", torch.float16: "F16"}


def random_parts(
    matrix: Matrix, dtype: str, *, generator: torch.Generator, scales: str = "F16"
) -> dict[str, Tensor]:
    """Parts as quantizing random weights of order in_features ** -0.5 would give them.

    Every integer occurs, and zeros lie outside the range of the integers now and then.
    """
    if is_kept(matrix):
        return forms.random_parts(matrix, generator, scales)
    parts = {}
    size = matrix.in_features**-0.5
    for name, shape, part_dtype in matrix_parts(matrix, dtype):
        kind = name.removeprefix(f"{matrix.name}.")
        noise = torch.randn(shape, generator=generator)
        if part_dtype == "U8":
            tensor = torch.randint(0, 256, shape, generator=generator)
        elif kind == "weight":
            tensor = noise * size
        elif kind == "zero":
            tensor = 2 ** (matrix.bits - 1) + 2 ** (matrix.bits - 2) * noise
        elif kind == "scale":
            tensor = size / 2 ** (matrix.bits - 1) * (1 + 0.3 * noise.abs())
        elif kind == "scale.scale":
            tensor = size / 2 ** (matrix.bits - 1) / 128 * (1 + 0.3 * noise.abs())
        elif kind == "zero.scale":
            tensor = 2**matrix.bits / 256 * (1 + 0.3 * noise.abs())
        else:  # scale.zero, zero.zero: of 8-bit numbers
            tensor = -20.3 + 10 * noise
        parts[name] = tensor.to(TORCH_DTYPES[part_dtype])
    return parts


class CachedLayer:
    """``num_experts`` experts [2I, H] and [H, I], in a cache of two slots more."""

    def __init__(
        self,
        matrices: tuple[Matrix, Matrix],
        *,
        num_experts: int = 4,
        dtype: torch.dtype = torch.bfloat16,
        bias: bool = False,
        activation: Activation = SILU,
        device: str = "cpu",
        scales: str = "F16",
        seed: int = 0,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layout = record_layout(
            matrices, NAMES[dtype], has_bias=bias, scales=[scales] * len(matrices)
        )
        self.num_experts, self.hidden, self.dtype = (
            num_experts,
            matrices[1].out_features,
            NAMES[dtype],
        )
        self.spec = ExpertsSpec(
            self.layout, GateOrder.CONCATENATED, reference_gate(activation), activation
        )
        size = num_experts * self.layout.record_bytes
        self.memory = mmap.mmap(-1, size)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self.memory))
        self.arena = ArenaTensors(address, size)
        self.offsets = [e * self.layout.record_bytes for e in range(num_experts)]
        for offset in self.offsets:
            for matrix in matrices:
                parts = random_parts(matrix, NAMES[dtype], generator=generator, scales=scales)
                if bias:
                    parts[f"{matrix.name}.bias"] = torch.randn(
                        matrix.out_features, generator=generator
                    ).to(dtype)
                for name, tensor in parts.items():
                    self.arena.part(offset, self.layout.part(name)).copy_(tensor)
        records = torch.frombuffer(self.memory, dtype=torch.uint8).view(num_experts, -1)
        self.records = records.clone()
        # A slot of garbage before and after: an offset of 0 and a slot too far hide nothing.
        self.cache = torch.full(
            (num_experts + 2, self.layout.record_bytes), 0xFF, dtype=torch.uint8, device=device
        )
        self.device = device
        self.hold({e: e + 1 for e in range(num_experts)})

    def hold(self, slots: dict[int, int]) -> None:
        """Only these experts are cached, each in its slot."""
        self.slot_of = torch.full((self.num_experts,), -1, dtype=torch.int32, device=self.device)
        self.cache.fill_(0xFF)
        for expert, slot in slots.items():
            self.slot_of[expert] = slot
            self.cache[slot] = self.records[expert].to(self.device)

    @property
    def wave(self) -> CachedWave:
        """What is cached now."""
        return CachedWave(self.cache, self.slot_of, self.spec)

    def expected(
        self, slots: Tensor, hidden: Tensor, index: Tensor, weights: Tensor, experts: Sequence[int]
    ) -> Tensor:
        """What the reference makes of ``slots``, on the CPU."""
        slots = slots.cpu().clone()
        rows = Routed(hidden.cpu(), index.cpu(), weights.cpu())
        wave = Wave(experts, [self.offsets[e] for e in experts], self.arena, self.spec)
        fill_slots(slots, rows, wave)
        return slots


def reference_gate(activation: Activation) -> Callable[[Tensor], Tensor]:
    """``apply_gate`` of the reference: the model's formula, in torch's operations."""
    kind = activation.kind

    def apply(gate_up: Tensor) -> Tensor:
        if kind is ActivationKind.RELU2:
            return functional.relu(gate_up).square()
        gate, up = gate_up.chunk(2, dim=-1)
        if kind is ActivationKind.GPT_OSS:
            gate = gate.clamp(max=activation.limit)
            up = up.clamp(min=-activation.limit, max=activation.limit)
            return (up + 1) * (gate * torch.sigmoid(gate * activation.alpha))
        function = {
            ActivationKind.SILU: functional.silu,
            ActivationKind.GELU: functional.gelu,
            ActivationKind.GELU_TANH: lambda x: functional.gelu(x, approximate="tanh"),
            ActivationKind.RELU: functional.relu,
        }[kind]
        return function(gate) * up

    return apply


def routed(
    tokens: int, k: int, num_experts: int, device: str = "cpu", seed: int = 0
) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    weights, index = torch.rand(tokens, num_experts, generator=generator).topk(k, dim=-1)
    return index.to(device), (weights / weights.sum(dim=-1, keepdim=True)).to(device)
