"""Whether a device can find experts by itself, so that a step is one recording."""

from expertd_inference.device.gpu_driven import GpuExperts, share_slots
from expertd_inference.device.recorder import GraphRecorder
from expertd_inference.device.runner import DeviceExpertsRunner
from expertd_inference.device.session_store import SessionStore
from expertd_inference.device.stats import DeviceStats
from expertd_inference.device.transaction import StepTransaction
from expertd_inference.device.whole import WholeExperts
from expertd_inference.experts.source import HeldSource
from expertstore.pack.manifest import Manifest

MIN_WHOLE_LINK = 10e9
"""Bytes per second below which whole steps are not chosen by themselves: in these all misses are
copied, and a CPU that computes its share of them is then faster. Estimated, not run on a GPU."""


def whole_experts(
    manifest: Manifest,
    runner: DeviceExpertsRunner,
    source: HeldSource,
    transaction: StepTransaction,
    stats: DeviceStats,
    recorder: GraphRecorder,
) -> WholeExperts | str:
    """The experts of steps that ``recorder`` records; or why the host has to bring them."""
    if not source.directory_address:
        return "this session has copies of its own"
    arena_address = runner.engine.device_address
    if not arena_address:
        return "its driver has not mapped the shared memory"
    record_bytes = {
        layer.layer: manifest.layouts[layer.layout].record_bytes for layer in manifest.layers
    }
    most = max(layer.experts_per_token for layer in manifest.layers)
    layers = share_slots(
        [
            (layer.layer, layer.num_experts, first, record_bytes[layer.layer])
            for layer, first in zip(manifest.layers, manifest.first_entries, strict=True)
        ],
        len(runner.engine.slots),
        most,
    )
    if layers is None:
        return "its cache has less than one token's experts of each layer"
    gpu = GpuExperts(runner.device, runner.engine.slots, layers, arena_address, recorder, most)
    store = SessionStore(source, transaction, runner, stats, record_bytes, gpu.clear)
    return WholeExperts(gpu, store)
