"""What moved where: the counts of a worker that computes on devices."""

import msgspec


class DeviceStats(msgspec.Struct, kw_only=True):
    """Counts since the worker began, or of one generation.

    Each time a layer needed an expert it was a device hit, a useful prefetch, a host hit or an
    NVMe miss; of host hits and NVMe misses ``cpu_computed`` were not copied. ``arena`` and
    ``steps`` are no counts but what was found possible.
    """

    arena: str = ""
    """How devices read shared memory: a :class:`.device.CopyMode`; empty before the first copy."""
    steps: str = "off"
    """How steps of one token ran last: ``whole`` or in ``segments``, else ``off``."""
    device_hits: int = 0
    """It was in the device's cache."""
    host_hits: int = 0
    """It was in RAM."""
    nvme_misses: int = 0
    """The daemon had to be asked for it."""
    cpu_computed: int = 0
    """It was computed from RAM by the CPU."""
    copies: int = 0
    """Records copied to devices, guesses included."""
    bytes_copied: int = 0
    prefetch_issued: int = 0
    """Records copied because they were guessed."""
    prefetch_useful: int = 0
    """Guesses that were used."""
    prefetch_late: int = 0
    """Useful ones that were still on their way when they were needed."""
    prefetch_wasted: int = 0
    """Guesses that gave way to others before they were used."""
    hints: int = 0
    """Guesses that were not in RAM and were hinted to the daemon."""
    syncs: int = 0
    """Times that the host waited for a device."""

    def since(self, before: "DeviceStats") -> "DeviceStats":
        """What happened after ``before``."""
        counts = {
            name: value - getattr(before, name)
            for name, value in msgspec.structs.asdict(self).items()
            if isinstance(value, int)
        }
        return msgspec.structs.replace(self, **counts)

    def copy(self) -> "DeviceStats":
        """As it is now."""
        return msgspec.structs.replace(self)
