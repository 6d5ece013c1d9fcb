"""Odd hosts, and what is said of them."""

import re
from dataclasses import replace
from pathlib import Path

import pytest

from expertd.doctor.checks import Finding, Health, examine, is_within
from expertd.doctor.host import (
    DaemonPlace,
    Disk,
    Driver,
    Gpu,
    Host,
    Kernel,
    Kernels,
    Memory,
    PackOnDisk,
)

GIB = 1 << 30
KERNEL = Kernel("6.1.0", "x86_64", True, True, "advise")
MEMORY = Memory(64 * GIB, 64 * GIB, 60 * GIB, None)
PACK = PackOnDisk(24 * GIB, GIB, 3e9)
DISK = Disk(Path("/packs/my pack"), 100 * GIB, True, PACK)
GPU = Gpu("NVIDIA H200", 139 * GIB, (9, 0), True, True)
PLACE = DaemonPlace(Path("/run/expertd"), "serving", other=Path("/home/alice/.expertd"))
VERSIONS = {"python": "3.11.2", "expertd": "0.1.0", "grpcio": "1.81.2", "torch": "2.13.0+cpu",
            "transformers": "5.23.0"}  # fmt: skip
WELL = Host(
    KERNEL,
    MEMORY,
    DISK,
    Driver("13.0", (GPU,)),
    VERSIONS,
    {"torch": "<2.14,>=2.11"},
    Kernels("avx2"),
    PLACE,
)


def rows(host: Host) -> dict[str, Finding]:
    return {row.name: row for row in examine(host)}


def test_a_host_that_is_well_needs_no_advice() -> None:
    assert all((row.state, row.advice) == (Health.OK, "") for row in examine(WELL))
    assert "60.0 GiB free of 64.0 GiB" in rows(WELL)["memory"].found
    without = rows(replace(WELL, driver=None))
    assert without["registration"] == Finding("registration", Health.OK, "none")
    assert without["GPU"].state is Health.OK


@pytest.mark.parametrize(
    ("host", "name", "state", "said"),
    [
        (replace(WELL, kernel=replace(KERNEL, has_sealed_memfd=False)), "kernel", "bad", "memfd"),
        (replace(WELL, kernel=replace(KERNEL, has_populate=False)), "kernel", "note", "Linux 5.14"),
        (
            replace(WELL, kernel=replace(KERNEL, shmem_huge_pages="never")),
            "huge pages", "note", "echo advise > /sys",
        ),
        (
            replace(WELL, kernel=replace(KERNEL, shmem_huge_pages=None)),
            "huge pages", "note", "a newer kernel",
        ),
        (
            replace(WELL, memory=replace(MEMORY, lock_bytes=8 << 20)),
            "locked memory", "note", "at most 8.0 MiB.*LimitMEMLOCK=infinity",
        ),
        (
            replace(WELL, memory=Memory(64 * GIB, 300 << 20, 200 << 20, None)),
            "memory", "bad", "of 300.0 MiB .its control group's limit; the host has 64.0 GiB",
        ),
        (
            replace(WELL, memory=replace(MEMORY, available_bytes=10 * GIB)),
            "memory", "note", "experts take 24.0 GiB.*read from disk",
        ),
        (
            replace(WELL, disk=replace(DISK, has_direct_io=False)), "disk", "note",
            "O_DIRECT.*local disk",
        ),
        (
            replace(WELL, disk=replace(DISK, pack=replace(PACK, read_rate=1e8))),
            "pack", "note", "0.1 GB/s.*NVMe",
        ),
        (
            replace(WELL, disk=replace(DISK, pack=replace(PACK, read_rate=None))),
            "pack", "bad", "expertd verify '/packs/my pack'",
        ),
        (
            replace(WELL, disk=replace(DISK, pack=None, pack_error="/x is not a pack")),
            "pack", "bad", "/x is not a pack.*expertd pack",
        ),
        (
            replace(WELL, driver=Driver("12.4", error="cuInit returns 803")),
            "GPU", "note", "cuInit returns 803.*nvidia-smi",
        ),
        (replace(WELL, driver=Driver("12.4")), "GPU", "note", "shows no GPU"),
        (
            replace(WELL, driver=Driver("12.4", (replace(GPU, capability=(7, 5)),))),
            "GPU 0", "note", "7.5.*--device cpu",
        ),
        (
            replace(WELL, driver=Driver("12.4", (replace(GPU, can_register_read_only=False),))),
            "registration", "note", "writable_uids",
        ),
        (
            replace(WELL, driver=Driver("12.4", (Gpu("G", GIB, (9, 0), False, False),))),
            "registration", "note", "through a buffer",
        ),
        (replace(WELL, versions=VERSIONS | {"torch": None}), "torch", "note", "serves packs, but"),
        (replace(WELL, versions=VERSIONS | {"grpcio": None}), "grpcio", "bad", "pip install"),
        (
            replace(WELL, versions=VERSIONS | {"torch": "2.9.1"}),
            "torch", "note", "2.9.1; tested with .*pip install 'torch<2.14,>=2.11'",
        ),
        (
            replace(WELL, kernels=Kernels("", "it was not built")),
            "native kernels", "note", "it was not built.*C.. compiler",
        ),
        (
            replace(WELL, place=replace(PLACE, answer="", may_serve=False)),
            "daemon", "bad", "--socket /home/alice/.expertd",
        ),
        (replace(WELL, place=replace(PLACE, answer="")), "daemon", "ok", "where one may serve"),
        (replace(WELL, place=replace(PLACE, answer="not serving")), "daemon", "note", "stopping"),
    ],
)  # fmt: skip
def test_what_is_not_well_and_what_to_do(host: Host, name: str, state: str, said: str) -> None:
    row = rows(host)[name]
    assert row.state == state
    assert re.search(said, f"{row.found} {row.advice}"), row
    assert bool(row.advice) == (row.state is not Health.OK)
    others = [each for each in examine(host) if each.name != name and each.state is not Health.OK]
    assert not others, "nothing else is blamed"


@pytest.mark.parametrize(
    ("version", "wanted", "within"),
    [
        ("2.13.0+cpu", "<2.14,>=2.11", True),
        ("2.14.0", "<2.14,>=2.11", False),
        ("2.10.9", "<2.14,>=2.11", False),
        ("0.2.8.post1", "==0.2.8.post1", True),
        ("2.5", "", True),
        ("odd", ">=1", True),
        ("1.0", "~=1.0", True),
    ],
)
def test_ranges(version: str, wanted: str, within: bool) -> None:
    assert is_within(version, wanted) is within
