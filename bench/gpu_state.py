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
    stats = group.stats
    return GpuState(stats.arena, stats.steps, group.num_replays)
