"""Which layers lie on which device, and how many experts each device keeps: plain arithmetic."""

from collections.abc import Sequence
from dataclasses import dataclass

from expertd_inference.settings import DeviceSettings
from expertstore.errors import InvalidInputError
from expertstore.pack.manifest import Manifest
from expertstore.sizes import format_bytes, size_to_give

RESERVE_SHARE = 0.1
"""Of a device's free memory, for what a forward pass needs."""
MAX_RESERVE_BYTES = 2 << 30

CPU = "cpu"


def device_names(settings: DeviceSettings) -> list[str]:
    """The devices that are asked for; none for the CPU. Raises InvalidInputError."""
    names = [name.strip() for name in settings.device.split(",")]
    if names == [CPU]:
        return []
    if CPU in names or "" in names or len(set(names)) < len(names):
        raise InvalidInputError(
            f"--device {settings.device} is not a list of different GPUs; give cpu, or such as "
            "cuda:0 or cuda:0,cuda:1."
        )
    return names


def place_layers(layers: Sequence[int], names: Sequence[str]) -> dict[int, str]:
    """Each MoE layer's device: consecutive runs of equal length, in the order of ``names``.

    Devices past the number of layers get none.
    """
    num_each = -(-len(layers) // len(names))
    return {layer: names[place // num_each] for place, layer in enumerate(layers)}


@dataclass(frozen=True)
class CacheSize:
    """The slots of one device's cache."""

    num_slots: int
    num_staging: int
    slot_bytes: int

    @property
    def num_bytes(self) -> int:
        """Of all slots."""
        return (self.num_slots + self.num_staging) * self.slot_bytes


def cache_size(
    manifest: Manifest,
    layers: Sequence[int],
    settings: DeviceSettings,
    *,
    free_bytes: int,
    name: str,
    kv_bytes: int = 0,
) -> CacheSize:
    """What a device of so many free bytes keeps of the experts of ``layers``.

    Without ``settings.cache_bytes``: all but a reserve and ``kv_bytes``, for keys and values.
    Raises InvalidInputError if the budget is below what one layer of one token needs.
    """
    chosen = [layer for layer in manifest.layers if layer.layer in set(layers)]
    slot_bytes = max(manifest.layouts[layer.layout].record_bytes for layer in chosen)
    num_experts = sum(layer.num_experts for layer in chosen)
    needed = max(layer.experts_per_token for layer in chosen)
    budget = settings.cache_bytes
    if budget is None:
        reserve = min(int(free_bytes * RESERVE_SHARE), MAX_RESERVE_BYTES)
        budget = max(0, free_bytes - reserve - kv_bytes)
    num_slots = budget // slot_bytes
    if num_slots >= num_experts:
        return CacheSize(num_experts, 0, slot_bytes)
    num_staging = settings.num_staging
    if num_slots < needed + num_staging:
        least = (needed + num_staging) * slot_bytes
        what = (
            f"{name} has {format_bytes(free_bytes)} free, of which {format_bytes(kv_bytes)} are "
            f"for keys and values and {format_bytes(budget)} for experts"
        )
        if settings.cache_bytes is not None:
            what = f"cache_bytes is {format_bytes(settings.cache_bytes)}"
        raise InvalidInputError(
            f"{what}, and one token uses {needed} experts of a layer, beside {num_staging} staging "
            f"slots, {format_bytes(slot_bytes)} each; give "
            f"{size_to_give(least)} or more (--cache-bytes)"
            f"{', or speculate less' if num_staging else ''}."
        )
    return CacheSize(num_slots - num_staging, num_staging, slot_bytes)
