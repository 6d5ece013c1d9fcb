"""Chooses how a model's steps of one token are recorded, and sets that up."""

from collections.abc import Callable, Mapping
from typing import Any

from torch import nn

from expertd_inference.device.gpu_driven import GpuExperts, share_slots
from expertd_inference.device.graphs import DecodeCache, DecodeGraphs, SegmentSteps, Steps
from expertd_inference.device.runner import DeviceExpertsRunner
from expertd_inference.device.session_store import SessionStore
from expertd_inference.device.stats import DeviceStats
from expertd_inference.device.step import Step
from expertd_inference.device.whole import WholeSteps
from expertd_inference.experts.call import seat_of
from expertd_inference.experts.source import HeldSource
from expertd_inference.settings import DecodeGraphsMode
from expertstore.pack.manifest import Manifest

MIN_WHOLE_LINK = 10e9
"""Bytes per second below which whole steps are not chosen by themselves: in these all misses are
copied, and a CPU that computes its share of them is then faster. Estimated, not run on a GPU."""


def record_decoding(
    model: Any,  # noqa: ANN401 - transformers is untyped
    experts: Mapping[int, nn.Module],
    manifest: Manifest,
    runner: DeviceExpertsRunner,
    source: HeldSource,
    step: Step,
    stats: DeviceStats,
    *,
    mode: DecodeGraphsMode,
    say: Callable[[str], None],
) -> DecodeGraphs:
    """Steps of one token with a :class:`DecodeCache` are recorded from now on.

    ``mode`` is SEGMENTS, WHOLE or AUTO, which is WHOLE where that is possible and the link fast
    enough; ``say`` is told if it was asked for and has to be the former. To be called once the
    experts are connected and the link is measured, and before the model's calls are made steps.
    """
    runners = {layer: seat_of(module).runner for layer, module in experts.items()}
    record_bytes = {
        layer.layer: manifest.layouts[layer.layout].record_bytes for layer in manifest.layers
    }
    said: set[str] = set()

    def segments(why: str = "") -> Steps:
        if why and why not in said and mode is DecodeGraphsMode.WHOLE:
            said.add(why)
            say(f"the GPU cannot find experts by itself ({why}); the host brings them.")
        return SegmentSteps(runner.device.recorder(), runners)

    def make_steps(cache: DecodeCache) -> Steps:
        if mode is DecodeGraphsMode.SEGMENTS:
            return segments()
        link = runner.cost.rates.link_bytes_per_second
        if mode is DecodeGraphsMode.AUTO and link < MIN_WHOLE_LINK:
            return segments()
        if not source.directory_address:
            return segments("this session has copies of its own")
        arena = runner.engine.device_address
        if not arena:
            return segments("its driver has not mapped the shared memory")
        layers = share_slots(
            [
                (layer.layer, layer.num_experts, first, record_bytes[layer.layer])
                for layer, first in zip(manifest.layers, manifest.first_entries, strict=True)
            ],
            len(runner.engine.slots),
            max(layer.experts_per_token for layer in manifest.layers),
        )
        if layers is None:
            return segments("its cache has less than one token's experts of each layer")
        recorder = runner.device.recorder()
        gpu = GpuExperts(runner.device, runner.engine.slots, layers, arena, recorder)
        store = SessionStore(source, step, runner, stats, record_bytes, gpu.clear)
        return WholeSteps(gpu, recorder, store, cache.rewind)

    return DecodeGraphs(model, experts, make_steps, say=say)
