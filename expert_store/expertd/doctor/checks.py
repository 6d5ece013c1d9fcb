"""Judges a host: each check is a function of plain values, and gives one row or several."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum

from expertd.doctor.host import Host
from expertstore.command_line import command
from expertstore.sizes import format_bytes

MIN_CAPABILITY = (8, 0)
SLOW_DISK = 0.5e9
"""Bytes per second below which a model that does not fit in RAM is no pleasure."""
_COMPUTE = ("torch", "transformers")


class Health(StrEnum):
    """How well something is."""

    OK = "ok"
    NOTE = "note"
    """It serves, but slower or with less than it could."""
    BAD = "bad"
    """It does not serve."""


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at, and what to do if it is not well."""

    name: str
    state: Health
    found: str
    advice: str = ""


def examine(host: Host) -> list[Finding]:
    """All rows, in the order in which things matter."""
    return [row for check in CHECKS for row in check(host)]


def _kernel(host: Host) -> Iterator[Finding]:
    kernel = host.kernel
    found = f"Linux {kernel.release}, {kernel.machine}"
    if not kernel.has_sealed_memfd:
        yield Finding(
            "kernel",
            Health.BAD,
            f"{found}, without sealed shared memory (memfd_create)",
            "run Linux 3.17 or newer, and a sandbox that allows memfd_create.",
        )
    elif not kernel.has_populate:
        yield Finding(
            "kernel",
            Health.NOTE,
            f"{found}, without MADV_POPULATE",
            "Linux 5.14 or newer clears and maps the arena faster.",
        )
    else:
        yield Finding("kernel", Health.OK, found)


def _huge_pages(host: Host) -> Iterator[Finding]:
    chosen = host.kernel.shmem_huge_pages
    if chosen is None:
        yield Finding(
            "huge pages",
            Health.NOTE,
            "this kernel has none for shared memory",
            "a newer kernel offers them; without, reading takes a few per cent longer.",
        )
    elif chosen in {"never", "deny"}:
        yield Finding(
            "huge pages",
            Health.NOTE,
            f"shmem_enabled is {chosen}",
            "as root, before the daemon starts: echo advise > "
            "/sys/kernel/mm/transparent_hugepage/shmem_enabled",
        )
    else:
        yield Finding("huge pages", Health.OK, f"shmem_enabled is {chosen}")


def _locking(host: Host) -> Iterator[Finding]:
    limit = host.memory.lock_bytes
    if limit is None:
        yield Finding("locked memory", Health.OK, "unlimited")
    else:
        yield Finding(
            "locked memory",
            Health.NOTE,
            f"at most {format_bytes(limit)}",
            "what is not locked may be swapped out: `ulimit -l unlimited` in the daemon's "
            "shell, LimitMEMLOCK=infinity in its unit, or --ulimit memlock=-1 for its "
            "container.",
        )


def _memory(host: Host) -> Iterator[Finding]:
    memory, pack = host.memory, host.disk.pack
    found = f"{format_bytes(memory.available_bytes)} free of {format_bytes(memory.limit_bytes)}"
    if memory.limit_bytes < memory.host_bytes:
        found += f" (its control group's limit; the host has {format_bytes(memory.host_bytes)})"
    if pack is not None and pack.working_set_bytes > memory.available_bytes:
        yield Finding(
            "memory",
            Health.BAD,
            f"{found}; one token of the pack uses {format_bytes(pack.working_set_bytes)}",
            "end what uses it, raise the control group's limit, or pack with fewer bits "
            "(--scheme paper-2bit).",
        )
    elif pack is not None and pack.expert_bytes > memory.available_bytes:
        yield Finding(
            "memory",
            Health.NOTE,
            f"{found}; the pack's experts take {format_bytes(pack.expert_bytes)}",
            "what does not fit is read from disk; `expert-run advise` says how fast that is.",
        )
    else:
        yield Finding("memory", Health.OK, found)


def _disk(host: Host) -> Iterator[Finding]:
    disk = host.disk
    found = f"{disk.path}: {format_bytes(disk.free_bytes)} free"
    if disk.has_direct_io is False:
        yield Finding(
            "disk",
            Health.NOTE,
            f"{found}, cannot be read past the page cache (O_DIRECT)",
            "put packs on a local disk (ext4, xfs): here each record takes RAM twice until "
            "the page cache gives way.",
        )
    else:
        yield Finding("disk", Health.OK, found + (", O_DIRECT" if disk.has_direct_io else ""))
    if disk.pack_error:
        yield Finding(
            "pack",
            Health.BAD,
            disk.pack_error,
            "make it with `expertd pack`, or copy it again; `expertd verify` reads all of it.",
        )
    elif disk.pack is not None:
        rate = disk.pack.read_rate
        size = format_bytes(disk.pack.expert_bytes)
        if rate is None:
            yield Finding(
                "pack",
                Health.BAD,
                f"{size} of experts, which cannot be read",
                f"see why: {command('expertd', 'verify', disk.path)}",
            )
        else:
            slow = rate < SLOW_DISK
            yield Finding(
                "pack",
                Health.NOTE if slow else Health.OK,
                f"{size} of experts, read at {rate / 1e9:.1f} GB/s",
                "give RAM for all experts, or move the pack to an NVMe drive." * slow,
            )


def _gpu(host: Host) -> Iterator[Finding]:
    driver = host.driver
    if driver is None:
        yield Finding("GPU", Health.OK, "none; workers compute on the CPU")
        yield Finding("registration", Health.OK, "none")
        return
    if driver.error or not driver.gpus:
        said = driver.error or "it shows no GPU to this process"
        yield Finding(
            "GPU",
            Health.NOTE,
            f"driver for CUDA {driver.version}: {said}",
            "nvidia-smi and CUDA_VISIBLE_DEVICES say which there are; a container needs "
            "--gpus all. Workers on the CPU do without.",
        )
        yield Finding("registration", Health.OK, "none")
        return
    for number, gpu in enumerate(driver.gpus):
        major, minor = gpu.capability
        found = (
            f"{gpu.name}, {format_bytes(gpu.memory_bytes)}, compute capability {major}.{minor}, "
            f"driver for CUDA {driver.version}"
        )
        if gpu.capability < MIN_CAPABILITY:
            yield Finding(
                f"GPU {number}",
                Health.NOTE,
                found,
                "bfloat16 needs 8.0 (Ampere) or newer: use --device cpu.",
            )
        else:
            yield Finding(f"GPU {number}", Health.OK, found)
        if gpu.can_register_read_only:
            yield Finding("registration", Health.OK, "the arena can be registered read-only")
        elif gpu.can_register:
            yield Finding(
                "registration",
                Health.NOTE,
                "of writable memory only, the driver says",
                "if a worker says that it copies through a buffer, name its user in "
                "writable_uids (docs/gpu-hosts.md says what that allows).",
            )
        else:
            yield Finding(
                "registration",
                Health.NOTE,
                "not possible, the driver says",
                "experts are copied through a buffer, slower; a newer driver may do it.",
            )


def _versions(host: Host) -> Iterator[Finding]:
    missing = [name for name, version in host.versions.items() if version is None]
    for name, version in host.versions.items():
        wanted = host.wanted.get(name, "")
        if version is None:
            needed = name not in _COMPUTE
            yield Finding(
                name,
                Health.BAD if needed else Health.NOTE,
                "not installed",
                "pip install expertd brings it."
                if needed
                else "this installation serves packs, but cannot make them or compute: for that, "
                "pip install expertd where its dependencies may come along.",
            )
        elif not is_within(version, wanted):
            yield Finding(
                name,
                Health.NOTE,
                f"{version}; tested with {wanted}",
                f"pip install {command(name + wanted)}",
            )
        else:
            yield Finding(name, Health.OK, version)
    if host.kernels.variant:
        yield Finding("native kernels", Health.OK, host.kernels.variant)
    elif not {*missing} & {*_COMPUTE}:
        yield Finding(
            "native kernels",
            Health.NOTE,
            f"none: {host.kernels.reason}",
            "workers on the CPU compute a hundred times slower: install a C++ compiler "
            "(GCC 9 or newer) and build them (make native).",
        )


def _place(host: Host) -> Iterator[Finding]:
    place = host.place
    if place.answer == "serving":
        yield Finding("daemon", Health.OK, f"serves at {place.path}")
    elif place.answer:
        yield Finding(
            "daemon",
            Health.NOTE,
            f"{place.answer} at {place.path}",
            "it is stopping: wait, or look at its log.",
        )
    elif not place.may_serve:
        other = command("--socket", place.other or "DIR")
        yield Finding(
            "daemon",
            Health.BAD,
            f"none answers at {place.path}, nor may this user serve there",
            f"give {other} to every command, or ask the host's administrator for a daemon.",
        )
    else:
        yield Finding("daemon", Health.OK, f"none answers at {place.path}, where one may serve")


CHECKS: tuple[Callable[[Host], Iterator[Finding]], ...] = (
    _kernel,
    _memory,
    _locking,
    _huge_pages,
    _disk,
    _place,
    _gpu,
    _versions,
)


def is_within(version: str, wanted: str) -> bool:
    """Whether it is in a range such as ``<2.14,>=2.11``; what cannot be read is."""
    number = _numbers(version)
    for bound in filter(None, wanted.split(",")):
        found = re.fullmatch(r"(<|>=|==)([0-9.]+)(?:\.post\d+)?", bound)
        if found is None or not number:
            continue
        limit = _numbers(found[2])
        short = number[: len(limit)]
        if {"<": short >= limit, ">=": short < limit, "==": short != limit}[found[1]]:
            return False
    return True


def _numbers(version: str) -> tuple[int, ...]:
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()
