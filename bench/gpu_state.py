"""What mode a worker's GPU is in: settings wish for it, the driver and the model decide."""

from typing import NamedTuple

from expertd_inference.device.group import DeviceGroup
from expertd_inference.settings import DecodeGraphsMode


class GpuState(NamedTuple):
    """``arena``: registered or staged. ``steps``: off, segments or whole; ``replays`` of them."""

    arena: str
    steps: str
    replays: int


def state_of(group: DeviceGroup) -> GpuState:
    """Of what ``group`` ran last."""
    arena = "+".join(sorted({runner.engine.mode or "unused" for runner in group.runners}))
    graphs = group.graphs
    if graphs is None or graphs._current is None or graphs._current.logits is None:
        return GpuState(arena, DecodeGraphsMode.OFF, 0)
    steps = type(graphs._current.steps).__name__.removesuffix("Steps").lower()
    return GpuState(arena, {"segment": "segments"}.get(steps, steps), graphs.num_replays)
