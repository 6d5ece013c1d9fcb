"""The engines of a model: one on each device, or one on each part of the host's cores."""

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

from expertd_inference.server.hosting.engine_child import CPU, EngineSpec
from expertstore.errors import InvalidInputError

_CPUS = Path("/sys/devices/system/cpu")
_NODES = Path("/sys/devices/system/node")

Place = tuple[int, ...]
"""Where a core is: cores are near each other if their places are."""


def replicas(spec: EngineSpec, devices: Sequence[str], num_engines: int) -> list[EngineSpec]:
    """As ``spec``, one for each of ``devices``; on the CPU ``num_engines`` that share its cores.

    Raises InvalidInputError if those do not fit together, or there are too few cores.
    """
    if num_engines == 1:
        if len({*devices}) < len(devices):
            raise InvalidInputError(
                f"A device is named twice (--device {' --device '.join(devices)}); an engine takes "
                "all of a device. For several engines on the CPU give --engines."
            )
        kinds = list(dict.fromkeys(device.partition(":")[0] for device in devices))
        if spec.exact and len(kinds) > 1:
            raise InvalidInputError(
                f"{' and '.join(kinds)} round otherwise, and with --exact a text may not depend on "
                "which of them computes it; leave out --exact, or name devices of one kind."
            )
        return [replace(spec, device=replace(spec.device, device=device)) for device in devices]
    if [*devices] != [CPU]:
        raise InvalidInputError(
            f"--engines {num_engines} is for the CPU; for several engines on GPUs repeat --device."
        )
    parts = core_sets(places(os.sched_getaffinity(0)), num_engines)
    limits = replace(spec.limits, num_engines=num_engines)
    return [replace(spec, cores=cores, limits=limits) for cores in parts]


def core_sets(cores: Mapping[int, Place], num_parts: int) -> list[tuple[int, ...]]:
    """``cores`` in so many parts of neighbours, as equal as can be.

    Raises InvalidInputError if there are fewer cores.
    """
    if num_parts > len(cores):
        raise InvalidInputError(
            f"There are {len(cores)} cores for {num_parts} engines; give --engines {len(cores)} "
            "or fewer."
        )
    ordered = sorted(cores, key=lambda core: (cores[core], core))
    ends = [len(ordered) * part // num_parts for part in range(num_parts + 1)]
    return [tuple(sorted(ordered[begin:end])) for begin, end in pairwise(ends)]


def places(cores: set[int]) -> dict[int, Place]:
    """Each core's memory node, and the first of the threads that are one core with it."""
    nodes = {
        core: int(file.parent.name.removeprefix("node"))
        for file in _NODES.glob("node[0-9]*/cpulist")
        for core in _numbers(file.read_text())
    }
    return {core: (nodes.get(core, 0), _first_sibling(core)) for core in cores}


def _first_sibling(core: int) -> int:
    try:
        return min(_numbers((_CPUS / f"cpu{core}/topology/thread_siblings_list").read_text()))
    except OSError:
        return core


def _numbers(text: str) -> list[int]:
    """Of a list as the kernel writes it: ``0-3,8``."""
    found: list[int] = []
    for part in filter(None, text.strip().split(",")):
        first, _, last = part.partition("-")
        found += range(int(first), int(last or first) + 1)
    return found
