"""How much memory there is, on hosts of each layout of control groups."""

from pathlib import Path

import pytest

from expertstore.errors import PreconditionError
from expertstore.shared.host_memory import memory_available, memory_total

MIB = 1 << 20
UNLIMITED_V1 = 9223372036854771712
TOTAL = 999999999 << 10


class Host:
    """A made-up ``/proc`` and ``/sys/fs/cgroup`` of a host of which ``available`` is free.

    ``groups``: the lines of ``/proc/self/cgroup``; ``mounts``: what is shown, where, of which type
    and with which options.
    """

    def __init__(
        self,
        root: Path,
        groups: str,
        *mounts: tuple[str, str, str, str],
        available: int = 100 * MIB,
    ) -> None:
        self.root = root
        (root / "proc/self").mkdir(parents=True)
        meminfo = f"MemTotal: {TOTAL >> 10} kB\nMemAvailable: {available >> 10} kB\n"
        (root / "proc/meminfo").write_text(meminfo)
        (root / "proc/self/cgroup").write_text(groups)
        lines = ["21 26 0:5 / /proc rw - proc proc rw"]
        lines += [
            f"3{number} 25 0:2{number} {shown} {place} rw,nosuid shared:9 - {kind} {kind} {options}"
            for number, (shown, place, kind, options) in enumerate(mounts)
        ]
        (root / "proc/self/mountinfo").write_text("\n".join(lines) + "\n")

    def v1(
        self, group: str, limit: int, used: int = 0, *, cache: int = 0, above: int = UNLIMITED_V1,
        reaches_down: bool = True,
    ) -> None:  # fmt: skip
        """A group of version 1, ``above``: the smallest limit above it."""
        self._write(group, "memory.limit_in_bytes", limit)
        self._write(group, "memory.usage_in_bytes", used)
        self._write(group, "memory.use_hierarchy", int(reaches_down))
        lines = f"inactive_file 1\nhierarchical_memory_limit {min(limit, above)}\n"
        self._write(group, "memory.stat", f"{lines}total_inactive_file {cache}")

    def v2(self, group: str, limit: int | str, used: int = 0, *, cache: int = 0) -> None:
        """A group of version 2."""
        self._write(group, "memory.max", limit)
        self._write(group, "memory.current", used)
        self._write(group, "memory.stat", f"anon 5\ninactive_file {cache}")

    def _write(self, group: str, name: str, value: object) -> None:
        path = self.root / "sys/fs/cgroup" / group / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{value}\n")

    @property
    def memory(self) -> tuple[int, int]:
        """What is available and what there is at all."""
        return memory_available(self.root), memory_total(self.root)


V1_MOUNTS = (
    ("/", "/sys/fs/cgroup/cpu", "cgroup", "rw,cpu,cpuacct"),
    ("/", "/sys/fs/cgroup/memory", "cgroup", "rw,memory"),
)
V2_MOUNT = ("/", "/sys/fs/cgroup", "cgroup2", "rw,nsdelegate")


def v1_host(root: Path, group: str = "slice/unit") -> Host:
    return Host(
        root, f"9:cpu,cpuacct:/elsewhere\n4:memory:/{group}\n1:name=systemd:/x\n", *V1_MOUNTS
    )


def v2_host(root: Path, group: str = "slice/unit") -> Host:
    return Host(root, f"0::/{group}\n", V2_MOUNT)


def test_without_groups_the_host_decides(tmp_path: Path) -> None:
    assert Host(tmp_path / "none", "").memory == (100 * MIB, TOTAL)
    bare = Host(tmp_path / "bare", "")
    (bare.root / "proc/self/cgroup").unlink()
    (bare.root / "proc/self/mountinfo").unlink()
    assert bare.memory == (100 * MIB, TOTAL)
    unmounted = Host(tmp_path / "unmounted", "4:memory:/a\n0::/a\n")
    assert unmounted.memory == (100 * MIB, TOTAL)


@pytest.mark.parametrize("limited", ["slice/unit", "slice", ""])
def test_every_group_above_limits(tmp_path: Path, limited: str) -> None:
    old, new = v1_host(tmp_path / "v1"), v2_host(tmp_path / "v2")
    for group in ("slice/unit", "slice", ""):
        old.v1(f"memory/{group}", UNLIMITED_V1, 90 * MIB)
        new.v2(group, "max", 90 * MIB)
    assert old.memory == new.memory == (100 * MIB, TOTAL)
    old.v1(f"memory/{limited}", 50 * MIB, 20 * MIB)
    new.v2(limited, 50 * MIB, 20 * MIB)
    assert old.memory == new.memory == (30 * MIB, 50 * MIB)


def test_both_versions_mounted(tmp_path: Path) -> None:
    """As systemd's hybrid layout: version 1 counts memory, the groups of version 2 do not."""
    groups = "4:memory:/unit\n0::/unit\n"
    unified = ("/", "/sys/fs/cgroup/unified", "cgroup2", "rw")
    host = Host(tmp_path / "old", groups, unified, *V1_MOUNTS)
    host.v1("memory/unit", 50 * MIB, 20 * MIB)
    (tmp_path / "old/sys/fs/cgroup/unified/unit").mkdir(parents=True)
    assert host.memory == (30 * MIB, 50 * MIB)
    # And the other way round: the memory controller has been moved to version 2.
    host = Host(tmp_path / "new", "3:cpu:/\n0::/unit\n", unified, V1_MOUNTS[0])
    host.v2("unified/unit", 50 * MIB, 20 * MIB)
    assert host.memory == (30 * MIB, 50 * MIB)


@pytest.mark.parametrize("escaped", [False, True], ids=["plain", "blank"])
def test_a_container_shown_its_own_group(tmp_path: Path, escaped: bool) -> None:
    """Without a cgroup namespace its path is the host's, and the mount's top its own group."""
    place = r"/sys/fs/cgroup/my\040memory" if escaped else "/sys/fs/cgroup/memory"
    mount = ("/docker/abc", place, "cgroup", "ro,memory")
    own = "my memory" if escaped else "memory"
    host = Host(tmp_path / "own", "4:memory:/docker/abc\n", mount)
    host.v1(own, 50 * MIB, 20 * MIB)
    assert host.memory == (30 * MIB, 50 * MIB)
    inner = Host(tmp_path / "inner", "4:memory:/docker/abc/init.scope\n", mount)
    inner.v1(own, 50 * MIB, 20 * MIB)
    inner.v1(f"{own}/init.scope", UNLIMITED_V1, 5 * MIB)
    assert inner.memory == (30 * MIB, 50 * MIB)
    # A path that the mount does not contain: what is mounted there is taken to be its own.
    other = Host(tmp_path / "other", "4:memory:/kubepods/pod1/x\n", mount)
    other.v1(own, 50 * MIB, 20 * MIB)
    assert other.memory == (30 * MIB, 50 * MIB)


def test_a_mount_of_another_group_is_passed_over(tmp_path: Path) -> None:
    other = ("/docker/other", "/sys/fs/cgroup/other", "cgroup", "rw,memory")
    host = Host(tmp_path, "4:memory:/docker/abc\n", other, *V1_MOUNTS)
    host.v1("other", 1 * MIB, 1 * MIB)
    host.v1("memory/docker/abc", 50 * MIB, 20 * MIB)
    assert host.memory == (30 * MIB, 50 * MIB)


def test_a_limit_above_what_the_mount_shows(tmp_path: Path) -> None:
    """A pod's, for a container of version 1: the kernel tells it in memory.stat."""
    host = Host(tmp_path, "4:memory:/\n", V1_MOUNTS[1])
    host.v1("memory", UNLIMITED_V1, 10 * MIB, above=60 * MIB)
    assert host.memory == (50 * MIB, 60 * MIB)


def test_a_group_of_version_1_that_does_not_reach_down(tmp_path: Path) -> None:
    host = v1_host(tmp_path)
    host.v1("memory/slice/unit", UNLIMITED_V1, 1 * MIB)
    host.v1("memory/slice", 5 * MIB, reaches_down=False)
    assert host.memory == (100 * MIB, TOTAL)
    host.v1("memory/slice/unit", 50 * MIB, 20 * MIB, reaches_down=False)
    assert host.memory == (30 * MIB, 50 * MIB)


def test_a_group_is_held_up_above_memory_high(tmp_path: Path) -> None:
    host = v2_host(tmp_path, "unit")
    host.v2("unit", 80 * MIB, 20 * MIB)
    (tmp_path / "sys/fs/cgroup/unit/memory.high").write_text("max\n")
    assert host.memory == (60 * MIB, 80 * MIB)
    (tmp_path / "sys/fs/cgroup/unit/memory.high").write_text(f"{50 * MIB}\n")
    assert host.memory == (30 * MIB, 50 * MIB)


def test_page_cache_is_not_used_memory(tmp_path: Path) -> None:
    old, new = v1_host(tmp_path / "v1", "unit"), v2_host(tmp_path / "v2", "unit")
    old.v1("memory/unit", 50 * MIB, 45 * MIB, cache=40 * MIB)
    new.v2("unit", 50 * MIB, 45 * MIB, cache=40 * MIB)
    assert old.memory == new.memory == (45 * MIB, 50 * MIB)


def test_a_full_group_leaves_nothing(tmp_path: Path) -> None:
    old, new = v1_host(tmp_path / "v1", "unit"), v2_host(tmp_path / "v2", "unit")
    old.v1("memory/unit", 10 * MIB, 11 * MIB)
    new.v2("unit", 10 * MIB, 11 * MIB)
    assert old.memory == new.memory == (0, 10 * MIB)


@pytest.mark.parametrize("unreadable", ["memory.max", "memory.current", "memory.stat"])
def test_what_cannot_be_read_is_not_made_up(tmp_path: Path, unreadable: str) -> None:
    host = v2_host(tmp_path, "unit")
    host.v2("", 60 * MIB, 10 * MIB)
    host.v2("unit", 50 * MIB, 20 * MIB)
    path = tmp_path / "sys/fs/cgroup/unit" / unreadable
    path.unlink()
    path.mkdir()  # even root cannot read it
    assert (
        host.memory
        == {
            "memory.max": (50 * MIB, 60 * MIB),
            "memory.current": (50 * MIB, 50 * MIB),
            "memory.stat": (30 * MIB, 50 * MIB),
        }[unreadable]
    )


def test_a_host_that_does_not_say_what_it_has(tmp_path: Path) -> None:
    host = Host(tmp_path, "")
    (tmp_path / "proc/meminfo").write_text("MemTotal: 5 kB\n")
    assert memory_total(tmp_path) == 5 << 10
    with pytest.raises(PreconditionError, match="it has no MemAvailable"):
        memory_available(tmp_path)
    (tmp_path / "proc/meminfo").unlink()
    with pytest.raises(PreconditionError, match=r"meminfo .*No such file.*ProcSubset=all"):
        _ = host.memory
