"""What mode a worker's GPU is in: settings wish for it, the driver and the model decide."""

from typing import NamedTuple

from expertd_inference.device.group import DeviceGroup


class GpuState(NamedTuple):
    """``arena``: registered, partial or staged. ``steps``: off, segments or whole, and replays."""

    arena: str
    steps: str
    replays: int


def state_of(group: DeviceGroup) -> GpuState:
    """Of what ``group`` ran last."""
    stats, graphs = group.stats, group.graphs
    return GpuState(stats.arena, stats.steps, 0 if graphs is None else graphs.num_replays)
