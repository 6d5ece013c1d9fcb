"""What the cost model starts from: link, CPU kernel and device kernel, measured on this host.

It takes about a second, so a host remembers it, in ``~/.cache/expertd/calibration.json``, by what
it depends on.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec
import torch

from expertd_inference.device.copy_engine import CopyEngine, SlotUpload
from expertd_inference.device.cost import TYPICAL, Rates
from expertd_inference.device.device import Device
from expertd_inference.experts.source import HeldSource
from expertd_inference.kernels.arena import ArenaTensors
from expertd_inference.kernels.wave import CachedWave, ExpertsSpec, Routed, Wave
from expertd_inference.process.measured import MeasuredOnce, cache_file
from expertstore.pack.layout import DOWN

MAX_RUNS = 5
MAX_SECONDS = 0.25
"""Of one of the measurements; the best run counts, since whatever disturbs only takes time. A run
before them does not count: kernels are compiled by it, and memory is entered into page tables."""


@dataclass(frozen=True)
class Probe:
    """What is measured: experts of one layer, from RAM, for one token."""

    device: Device
    engine: CopyEngine
    source: HeldSource
    layer: int
    experts: Sequence[int]
    spec: ExpertsSpec
    fill_slots: Callable[[torch.Tensor, Routed, Wave], None]
    dtype: torch.dtype = torch.bfloat16

    @property
    def key(self) -> str:
        """What the result depends on, besides the host."""
        return " ".join(
            (
                self.device.hardware,
                self.engine.mode,
                f"{self.spec.layout.record_bytes} bytes",
                f"{torch.get_num_threads()} threads",
                getattr(self.fill_slots, "__module__", ""),
                f"{self.dtype}",
            )
        )


def measure(probe: Probe) -> Rates:
    """Runs it. Raises what the source and the device raise.

    The records are copied to the device's first slots, which must hold nothing yet.
    """
    waves = probe.source.waves(probe.layer, list(probe.experts), in_arena=True)
    lease = next(waves)
    with lease:
        offsets, experts = lease.offsets, lease.experts
        copies = _both(probe, len(offsets), lambda num: _copy(probe, offsets[:num]))
        on_cpu = _both(probe, len(offsets), lambda num: _on_cpu(probe, experts[:num], offsets))
        kernel = _best(probe, lambda: _kernel(probe, experts))
    num_bytes = len(offsets) * probe.spec.layout.record_bytes
    link_rate, copy_seconds = copies
    cpu_rate, cpu_seconds = on_cpu
    link_rate = link_rate or TYPICAL.link_bytes_per_second
    device_rate = num_bytes / kernel if kernel else TYPICAL.device_bytes_per_second
    return Rates(
        link_bytes_per_second=link_rate,
        copy_seconds=copy_seconds,
        cpu_bytes_per_second=cpu_rate or TYPICAL.cpu_bytes_per_second,
        cpu_seconds=cpu_seconds,
        # No device reads its own memory more slowly than it is filled over the link: what a
        # kernel over small records takes is its launch.
        device_bytes_per_second=max(device_rate, link_rate),
    )


def calibration(path: Path | None = None) -> MeasuredOnce[Rates]:
    """What this host remembers, in ``calibration.json`` of the user's cache directory."""
    path = path or cache_file("calibration.json")
    decoder = msgspec.json.Decoder(dict[str, Rates])
    return MeasuredOnce(path, decoder, "how fast link, CPU and GPU are", _is_sane)


def calibrated(probe: Probe, remembered: MeasuredOnce[Rates]) -> Rates:
    """What is remembered of the probe's key, or else measured now. Raises as :func:`measure`."""
    probe.engine.attach()
    return remembered.values([probe.key], lambda _: measure(probe))[probe.key]


def _is_sane(rates: Rates) -> bool:
    """Whether it can have been measured, by us as we are now.

    A rate of zero would be divided by. Once the compiler was timed with the device's kernels; what
    that left in the file is below the link's rate.
    """
    positive = (rates.link_bytes_per_second, rates.cpu_bytes_per_second)
    return (
        min(positive) > 0
        and min(rates.copy_seconds, rates.cpu_seconds) >= 0
        and rates.device_bytes_per_second >= rates.link_bytes_per_second
    )


def _both(probe: Probe, num: int, run: Callable[[int], None]) -> tuple[float | None, float]:
    """Bytes per second, and the seconds of a call beside them, from one record and from all.

    None for a rate that no time passed for, as with one record, or on a clock that stands still.
    """
    size = probe.spec.layout.record_bytes
    one, many = _best(probe, lambda: run(1)), _best(probe, lambda: run(num))
    if num < 2 or many <= one:
        return (size * num / many if many > 0 else None), 0.0
    rate = (num - 1) * size / (many - one)
    return rate, max(0.0, one - size / rate)


def _best(probe: Probe, run: Callable[[], None]) -> float:
    run()
    clock, best, begin = probe.device.clock, float("inf"), probe.device.clock()
    for _ in range(MAX_RUNS):
        before = clock()
        run()
        now = clock()
        best = min(best, now - before)
        if now - begin > MAX_SECONDS:
            break
    return best


def _copy(probe: Probe, offsets: Sequence[int]) -> None:
    size = probe.spec.layout.record_bytes
    events = [probe.engine.copy(slot, offset, size) for slot, offset in enumerate(offsets)]
    for event in events:
        event.wait()


def _on_cpu(probe: Probe, experts: Sequence[int], offsets: Sequence[int]) -> None:
    routed = _token(probe, experts, torch.device("cpu"))
    arena = ArenaTensors(probe.source.arena_address, probe.source.mapped_bytes)
    wave = Wave(list(experts), list(offsets[: len(experts)]), arena, probe.spec)
    probe.fill_slots(routed.empty_slots(), routed, wave)


def _kernel(probe: Probe, experts: Sequence[int]) -> None:
    """Over the slots that :func:`_copy` has filled."""
    device = probe.device
    routed = _token(probe, experts, device.torch_device)
    slot_of = SlotUpload(device).upload(
        max(experts) + 1, [(expert, slot) for slot, expert in enumerate(experts)]
    )
    device.fill_slots_cached(
        routed.empty_slots(), routed, CachedWave(probe.engine.slots, slot_of, probe.spec)
    )
    probe.engine.read(range(len(experts)))
    device.mark().wait()


def _token(probe: Probe, experts: Sequence[int], where: torch.device) -> Routed:
    """A row that goes to ``experts``."""
    size, dtype = probe.spec.layout.matrix(DOWN).out_features, probe.dtype
    return Routed(
        torch.ones(1, size, dtype=dtype).to(where),
        torch.tensor([list(experts)]).to(where),
        torch.ones(1, len(experts), dtype=dtype).to(where),
    )
