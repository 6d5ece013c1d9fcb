"""What the doctor knows of a host: plain values, of which tests lay out odd hosts."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path


@dataclass(frozen=True)
class Kernel:
    """Linux, by its release, and what it is asked for."""

    release: str
    machine: str
    has_sealed_memfd: bool
    """Shared memory without a file, which cannot shrink below its readers."""
    has_populate: bool
    """MADV_POPULATE_READ and _WRITE."""
    shmem_huge_pages: str | None
    """The chosen word of ``shmem_enabled``; None if there is no such file."""


@dataclass(frozen=True)
class Memory:
    """Bytes."""

    host_bytes: int
    limit_bytes: int
    """Of the host or the control group, whichever is less."""
    available_bytes: int
    lock_bytes: int | None
    """That this user may lock; None: any."""


@dataclass(frozen=True)
class PackOnDisk:
    """The pack that was asked about."""

    expert_bytes: int
    working_set_bytes: int
    """Of one token's experts."""
    read_rate: float | None
    """Bytes per second of reads past the page cache, or None if none succeeded."""


@dataclass(frozen=True)
class Disk:
    """Where packs lie, or are to lie."""

    path: Path
    free_bytes: int
    has_direct_io: bool | None
    """None: this user may not write there, and it cannot be told."""
    pack: PackOnDisk | None = None
    pack_error: str = ""
    """Why what was asked about is no usable pack."""


@dataclass(frozen=True)
class Gpu:
    """One that the driver shows to this process."""

    name: str
    memory_bytes: int
    capability: tuple[int, int]
    can_register: bool
    """Host memory, for copies at the link's speed."""
    can_register_read_only: bool
    """The same of memory that this process may only read, such as the arena."""


@dataclass(frozen=True)
class Driver:
    """NVIDIA's; ``error`` is why it does not work though it is there."""

    version: str
    gpus: tuple[Gpu, ...] = ()
    error: str = ""


@dataclass(frozen=True)
class Kernels:
    """The native code that computes on the CPU; ``variant`` is empty if there is none."""

    variant: str
    reason: str = ""


@dataclass(frozen=True)
class DaemonPlace:
    """The socket directory that the commands would use."""

    path: Path
    answer: str
    """Of the daemon there: ``serving``, ``not serving``, or empty if none answers."""
    error: str = ""
    """Why none answers."""
    may_serve: bool = True
    """Whether this user may make a daemon's sockets there."""
    other: Path | None = None
    """A directory that is surely this user's."""


@dataclass(frozen=True)
class Host:
    """All of it."""

    kernel: Kernel
    memory: Memory
    disk: Disk
    driver: Driver | None
    """None where there is none."""
    versions: Mapping[str, str | None]
    """Of the packages that matter, by name; None: not installed."""
    wanted: Mapping[str, str] = field(default_factory=dict)
    """Their ranges, as expertd's own metadata give them."""
    kernels: Kernels = Kernels("")
    place: DaemonPlace = DaemonPlace(Path(), "")
