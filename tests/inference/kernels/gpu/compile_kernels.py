"""Compiles every Triton kernel for GPUs that need not be there.

    python -m tests.inference.kernels.gpu.compile_kernels 80 90 120

The interpreter takes Python that the compiler refuses; only compiling shows that. Launches go
through Triton's own path, up to the point where they would need a device. One line per kernel:
compute capability, what it is compiled for, name, registers of a thread, bytes spilled.
"""

import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from expertd.packing.schemes import parse_precision
from expertd_inference.kernels.activation import Activation, ActivationKind
from expertd_inference.kernels.gpu import triton_experts, triton_gather, triton_linear
from expertd_inference.kernels.wave import CachedWave, ExpertsSpec, Routed
from expertd_inference.kernels.weights import QuantizedWeight
from expertd_testing.forms import named
from expertstore.pack.layout import record_layout
from expertstore.pack.manifest import GateOrder

SILU = Activation(ActivationKind.SILU)
GPT_OSS = Activation(ActivationKind.GPT_OSS, 1.702, 7.0)
RELU2 = Activation(ActivationKind.RELU2)
FEW, MANY = 1, 64

EXPERTS = [  # precision, tokens, hidden, inner, activation
    ("8g128", FEW, 2048, 768, SILU),
    ("4g64", FEW, 2048, 768, SILU),
    ("4g64m", MANY, 2048, 768, RELU2),
    ("3g64m", FEW, 2048, 768, SILU),
    ("3g64m", MANY, 2048, 768, SILU),
    ("2g16m", FEW, 4096, 14336, SILU),
    ("2g16m", MANY, 4096, 14336, SILU),
    ("mxfp4", FEW, 2880, 2880, GPT_OSS),
    ("mxfp4", MANY, 2880, 2880, GPT_OSS),
    ("nvfp4", MANY, 2048, 768, SILU),
    ("fp8:128x128", FEW, 2048, 768, SILU),
    ("fp8:128x128", MANY, 2048, 768, SILU),
    ("16", FEW, 37, 21, SILU),
]
LOOKUPS = [(1, 8, 128, 20), (1, 2, 8, 2), (8, 8, 128, 128), (1, 1, 4, 1)]
"""Tokens, top k, experts, slots of a layer."""
LINEARS = [("8g128", FEW), ("4g64", MANY)]


class NoDriver:
    """What Triton asks its driver before it launches."""

    def __init__(self, capability: int) -> None:
        self.capability = capability
        self.compiled_for = ""
        """What is to be shown beside the kernels."""

    def get_current_device(self) -> int:
        # Kernels are kept by device.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", self.capability, 32)


def compile_all(capability: int) -> None:
    shown = NoDriver(capability)
    driver.set_active(shown)
    for precision, tokens, hidden, inner, activation in EXPERTS:
        shown.compiled_for = f"{precision}:{tokens}:{hidden}x{inner}"
        bias, gated = activation is GPT_OSS, activation is not RELU2
        matrices = (
            named(precision, *(("gate_up", 2 * inner) if gated else ("up", inner)), hidden),
            named(precision, "down", hidden, inner),
        )
        layout = record_layout(matrices, "BF16", has_bias=bias)
        spec = ExpertsSpec(layout, GateOrder.CONCATENATED, torch.nn.functional.silu, activation)
        triton_experts.fill_slots_cached(
            torch.zeros(tokens, 4, hidden),
            Routed(
                torch.zeros(tokens, hidden, dtype=torch.bfloat16),
                torch.zeros(tokens, 4, dtype=torch.int64),
                torch.zeros(tokens, 4),
            ),
            CachedWave(
                torch.zeros(1, layout.record_bytes, dtype=torch.uint8),
                torch.zeros(16, dtype=torch.int32),
                spec,
            ),
        )
    for precision, tokens in LINEARS:
        shown.compiled_for = f"{precision}:{tokens}:2048x4096"
        matrix = parse_precision(precision).matrix("weight", 2048, 4096)
        parts: dict[str, Tensor] = {
            "weight.q": torch.zeros(matrix.bits * 256, 4096, dtype=torch.uint8),
            "weight.scale": torch.zeros(2048, 4096 // matrix.group_size, dtype=torch.float16),
            "weight.zero": torch.zeros(2048, 4096 // matrix.group_size, dtype=torch.float16),
        }
        x = torch.zeros(tokens, 4096, dtype=torch.bfloat16)
        triton_linear.linear(x, QuantizedWeight(matrix, parts))
    for tokens, k, experts, num_slots in LOOKUPS:
        shown.compiled_for = f"{tokens}:{k}of{experts}:{num_slots}"
        entries = 48 * experts
        table = triton_gather.SlotTable.empty(entries, 48 * num_slots, "cpu")
        resolution = triton_gather.Resolution.empty(entries, "cpu")
        triton_gather.resolve(
            torch.zeros(tokens, k, dtype=torch.int64),
            table,
            resolution,
            directory=torch.zeros(entries, dtype=torch.int64),
            num_experts=experts,
            first_entry=experts,
            first_slot=num_slots,
            num_slots=num_slots,
        )
        triton_gather.gather(
            resolution,
            torch.zeros(1, 4096 * 600, dtype=torch.uint8),
            # As high as addresses of mappings are.
            arena=0x7F0000000000,
            num_items=tokens * k,
            record_bytes=4096 * 599,
        )


def show(name: str, kernel: Any) -> None:
    found = re.search(r"REG:(\d+) STACK:(\d+)", _resources(kernel.asm["cubin"]))
    registers, spilled = found.groups() if found else ("?", "?")
    active = driver.active
    sys.stdout.write(f"{active.capability} {active.compiled_for} {name} {registers} {spilled}\n")


def _resources(cubin: bytes) -> str:
    tool = Path(triton.__path__[0], "backends/nvidia/bin/cuobjdump")
    with tempfile.NamedTemporaryFile() as file:
        file.write(cubin)
        file.flush()
        return subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, timeout=60, check=True
        ).stdout


def main() -> None:
    run = JITFunction.run

    def compile_only(self: JITFunction, *args: Any, grid: Any, warmup: bool, **rest: Any) -> None:
        show(self.__name__, run(self, *args, grid=grid, warmup=True, **rest))

    JITFunction.run = compile_only
    for capability in sys.argv[1:]:
        compile_all(int(capability))


if __name__ == "__main__":
    main()
