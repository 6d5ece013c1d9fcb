"""Kernels run on the GPU of their tensors, whichever is current: on pretended GPUs."""

import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch._subclasses import FakeTensorMode

from expertd.packing.schemes import parse_precision
from expertd_inference.kernels.wave import CachedWave, Routed
from expertd_inference.kernels.weights import QuantizedWeight
from tests.inference.kernels.gpu.cached_layer import CachedLayer

pytest.importorskip("triton")
from triton.runtime.jit import KernelInterface

from expertd_inference.kernels.gpu import triton_experts, triton_gather, triton_gemv, triton_linear
from expertd_inference.kernels.gpu.triton_route import Tiles

OURS = "cuda:1"


class Host:
    """A process with several GPUs, of which ``current`` is the thread's."""

    def __init__(self) -> None:
        self.current = 0
        self.launched: list[tuple[str, int]] = []
        """Kernels, and where they went."""

    def exchange(self, index: int) -> int:
        before, self.current = self.current, index if index >= 0 else self.current
        return before

    def kernel(self, name: str) -> Any:
        def launch(*args: Any, **kwargs: Any) -> None:
            self.launched.append((name, self.current))

        class Kernel:
            def __getitem__(self, grid: Any) -> Callable[..., None]:
                return launch

        return Kernel()


@pytest.fixture
def host(monkeypatch: pytest.MonkeyPatch) -> Host:
    host = Host()
    monkeypatch.setattr(torch.cuda, "_exchange_device", host.exchange)
    monkeypatch.setattr(torch.cuda, "_maybe_exchange_device", host.exchange)
    for module in [*sys.modules.values()]:
        if getattr(module, "__name__", "").startswith("expertd_inference.kernels.gpu.triton_"):
            for name, value in vars(module).copy().items():
                if isinstance(value, KernelInterface):
                    monkeypatch.setattr(module, name, host.kernel(name))
            if hasattr(module, "aligned"):
                # Tensors that are pretended have no address.
                monkeypatch.setattr(module, "aligned", torch.Tensor.contiguous)
    # torch alone, whose operations take their tensors' device by themselves.
    monkeypatch.setattr(triton_experts, "route", no_tiles)
    return host


def no_tiles(top_k_index: torch.Tensor, slot_of: torch.Tensor, tile_pairs: int) -> Tiles:
    return Tiles(*[torch.empty(4, dtype=torch.int64, device=OURS) for _ in Tiles._fields])


def experts(num_tokens: int) -> None:
    precision = parse_precision("4g64")
    matrices = precision.matrix("gate_up", 128, 128), precision.matrix("down", 128, 64)
    spec = CachedLayer(matrices, num_experts=1).spec
    with FakeTensorMode():
        triton_experts.fill_slots_cached(
            torch.empty(num_tokens, 2, 128, device=OURS),
            Routed(
                torch.empty(num_tokens, 128, device=OURS),
                torch.empty(num_tokens, 2, dtype=torch.int64, device=OURS),
                torch.empty(num_tokens, 2, device=OURS),
            ),
            CachedWave(
                torch.empty(4, spec.layout.record_bytes, dtype=torch.uint8, device=OURS),
                torch.empty(8, dtype=torch.int32, device=OURS),
                spec,
            ),
        )


def linear(num_tokens: int) -> None:
    matrix = parse_precision("16").matrix("weight", 64, 128)
    with FakeTensorMode():
        weight = QuantizedWeight(matrix, {"weight.weight": torch.empty(64, 128, device=OURS)})
        triton_linear.linear(torch.empty(num_tokens, 128, device=OURS), weight)


def misses(_: int) -> None:
    with FakeTensorMode():
        table = triton_gather.SlotTable.empty(8, 4, OURS)
        resolution = triton_gather.Resolution.empty(8, OURS)
        triton_gather.resolve(
            torch.empty(1, 2, dtype=torch.int64, device=OURS),
            table,
            resolution,
            directory=torch.empty(8, dtype=torch.int64, device=OURS),
            num_experts=8,
            first_entry=0,
            first_slot=0,
            num_slots=4,
        )
        triton_gather.gather(
            resolution,
            torch.empty(4, 4096, dtype=torch.uint8, device=OURS),
            arena=4096,
            num_items=2,
            record_bytes=4096,
        )


@pytest.mark.parametrize("call", [experts, linear, misses])
@pytest.mark.parametrize("num_tokens", [1, 100])
def test_a_launch_goes_to_its_tensors(
    call: Callable[[int], None], num_tokens: int, host: Host
) -> None:
    assert triton_gemv.aligned is torch.Tensor.contiguous
    call(num_tokens)
    assert len(host.launched) >= (1 if call is linear else 2)
    assert {where for _, where in host.launched} == {1}, host.launched
    assert host.current == 0, "the thread's choice is not ours"
