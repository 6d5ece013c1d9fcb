"""A real systemd for tests: PID 1 of its own namespaces, over a throw-away copy of this host.

The copy is an overlay whose changes go to a tmpfs, the network is an empty one, and the cgroup
is its own, so nothing of the host is touched. It takes root, as in many CI containers.
"""

import os
import shutil
import signal
import site
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).parents[2]
BOOT_SECONDS = 60.0
# This Python with its packages and this repository, wherever they lie, perhaps in a home
# directory that the service must not see.
_PATHS = [
    f"/opt/source/{name}" for name in ("proto", "expert_store", "client", "tests/doubles", ".")
]
_PYTHON = f"""#!/bin/sh
export LD_LIBRARY_PATH=/opt/python/lib PYTHONDONTWRITEBYTECODE=1
export PYTHONPATH={":".join([*_PATHS, "/opt/packages"])}
exec /opt/python/bin/python3 "$@"
"""
_EXPERTD = """#!/bin/sh
exec /opt/expertd/bin/python -m expertd "$@"
"""
INIT = next((path for path in ("/usr/lib/systemd/systemd", "/lib/systemd/systemd")
             if Path(path).exists()), None)  # fmt: skip

# $1: a scratch directory, $2: a new cgroup, $3: this Python's prefix, $4: its packages, $5: the
# repository. Units of the host's hardware would fail or, worse, find it.
_BOOT = r"""
set -e
echo $$ >"$2/cgroup.procs"
PATH=$PATH:/usr/sbin:/sbin
exec setpriv --pdeathsig KILL \
    unshare --pid --fork --mount --uts --ipc --net --cgroup --kill-child bash -ec '
    mount --make-rprivate /
    root=$1/root; mkdir "$root" "$1/layer"
    mount -t tmpfs tmpfs "$1/layer"
    mkdir "$1/layer/upper" "$1/layer/work"
    mount -t overlay -o "lowerdir=/,upperdir=$1/layer/upper,workdir=$1/layer/work" overlay "$root"
    mount -t proc proc "$root/proc"
    mount -t sysfs -o ro sysfs "$root/sys"
    mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
    for place in run dev; do mount -t tmpfs -o mode=755 tmpfs "$root/$place"; done
    mount -t tmpfs tmpfs "$root/tmp"
    for device in null zero full random urandom tty; do
        touch "$root/dev/$device"; mount --bind "/dev/$device" "$root/dev/$device"
    done
    mkdir "$root/dev/pts" "$root/dev/shm"
    mount -t tmpfs tmpfs "$root/dev/shm"
    mount -t devpts -o newinstance,ptmxmode=666 devpts "$root/dev/pts"
    ln -s pts/ptmx "$root/dev/ptmx"; ln -s /proc/self/fd "$root/dev/fd"
    bind() { mkdir -p "$root$2"; mount --bind "$1" "$root$2"; }
    bind "$3" /opt/python; bind "$4" /opt/packages; bind "$5" /opt/source; bind "$1" /opt/shared
    ip link set lo up 2>/dev/null || true
    for unit in systemd-udevd systemd-udev-trigger systemd-modules-load systemd-networkd \
        systemd-resolved systemd-timesyncd systemd-sysctl systemd-hwdb-update systemd-remount-fs \
        systemd-random-seed systemd-binfmt systemd-firstboot ldconfig; do
        ln -sf /dev/null "$root/etc/systemd/system/$unit.service"
    done
    : >"$root/etc/fstab"
    exec chroot "$root" env -i container=test PATH=/usr/sbin:/usr/bin:/sbin:/bin \
        "$6" --system --unit=basic.target --log-target=journal --show-status=0
' boot "$@"
"""


class UnbootableError(Exception):
    """This host does not let us boot a systemd."""


class Machine:
    """A booted systemd. ``shared`` is a directory that it sees as ``/opt/shared``."""

    def __init__(self, process: "subprocess.Popen[bytes]", shared: Path) -> None:
        self._process, self.shared = process, shared
        self._init = 0

    def wait_booted(self) -> None:
        """Until PID 1 has reached its target. Raises :class:`UnbootableError`."""
        deadline = time.monotonic() + BOOT_SECONDS
        children = Path(f"/proc/{self._process.pid}/task/{self._process.pid}/children")
        while time.monotonic() < deadline and self._process.poll() is None:
            with suppress(OSError, LookupError):
                self._init = int(children.read_text().split()[0])
                state = self.run("systemctl is-system-running", check=False).stdout.strip()
                if state in ("running", "degraded"):
                    return
            time.sleep(0.1)
        console = (self.shared / "console").read_text(errors="replace")[-2000:].strip()
        raise UnbootableError(f"systemd does not boot in namespaces here: {console or 'mute'}")

    def run(
        self, command: str, *, check: bool = True, timeout: float = 60
    ) -> "subprocess.CompletedProcess[str]":
        """A shell command in it, as root."""
        done = subprocess.run(
            [*self._enter(), "bash", "-c", command],
            capture_output=True, text=True, timeout=timeout, check=False,
        )  # fmt: skip
        assert not check or done.returncode == 0, f"{command}\n{done.stdout}{done.stderr}"
        return done

    def python(self, uid: int, groups: str, script: str) -> "subprocess.Popen[str]":
        """A Python process of another user, with the tests and expertd to import."""
        identity = [f"--reuid={uid}", "--regid=65534", f"--groups={groups}"]
        return subprocess.Popen(
            [*self._enter(), "setpriv", *identity, "/opt/expertd/bin/python", "-c", script],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip

    def show(self, unit: str, key: str) -> str:
        """A property of a unit."""
        return self.run(f"systemctl show --value -p {key} {unit}").stdout.strip()

    def journal(self, unit: str) -> str:
        """What a unit has logged."""
        return self.run(f"journalctl --no-pager -o cat -u {unit}").stdout

    def until(self, condition: Callable[[], bool], what: str, seconds: float = 30.0) -> None:
        """Waits for it."""
        deadline = time.monotonic() + seconds
        while not condition():
            assert time.monotonic() < deadline, f"{what} did not come\n{self.journal('expertd')}"
            time.sleep(0.05)

    def _enter(self) -> list[str]:
        return [
            "nsenter", "-t", str(self._init), "-m", "-u", "-i", "-n", "-p", "-C", "-r", "-w",
            "env", "-i", "PATH=/usr/sbin:/usr/bin:/sbin:/bin", "LANG=C.UTF-8",
        ]  # fmt: skip


@contextmanager
def booted(scratch: Path) -> Iterator[Machine]:
    """A machine until the block ends. Raises :class:`UnbootableError`."""
    if os.geteuid() != 0 or INIT is None or shutil.which("nsenter") is None:
        raise UnbootableError("booting a systemd takes root, Debian's package systemd and nsenter")
    cgroup = _own_cgroup() / f"expertd-test-{os.getpid()}"
    try:
        cgroup.mkdir()
    except OSError as error:
        raise UnbootableError(f"{cgroup} cannot be made: {error.strerror}") from error
    packages = next(path for path in site.getsitepackages() if Path(path).is_dir())
    python = Path(sys.base_prefix).resolve()
    with (scratch / "console").open("wb") as console:
        process = subprocess.Popen(
            ["bash", "-c", _BOOT, "boot", *map(str, (scratch, cgroup, python)),
             packages, str(ROOT), INIT],
            stdin=subprocess.DEVNULL, stdout=console, stderr=console, start_new_session=True,
        )  # fmt: skip
    try:
        machine = Machine(process, scratch)
        machine.wait_booted()
        for name, text in (("python", _PYTHON), ("expertd", _EXPERTD)):
            (scratch / name).write_text(text)
            machine.run(f"install -D /opt/shared/{name} /opt/expertd/bin/{name}")
        yield machine
    finally:
        process.send_signal(signal.SIGKILL)  # --kill-child: its PID 1 dies, and with it all
        process.wait()
        _remove(cgroup)


def _own_cgroup() -> Path:
    """This process's cgroup in the hierarchy of version 2."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    own = next(
        (line[3:] for line in Path("/proc/self/cgroup").read_text().splitlines()
         if line.startswith("0::")), None,
    )  # fmt: skip
    for _, place, kind, *_ in mounts:
        if kind == "cgroup2" and own is not None:
            return Path(place) / own.lstrip("/")
    raise UnbootableError("there is no cgroup hierarchy of version 2 here")


def _remove(cgroup: Path) -> None:
    """The cgroup with those below it; their processes may take a moment to be gone."""
    deadline = time.monotonic() + 10
    while cgroup.exists() and time.monotonic() < deadline:
        for path, _, _ in os.walk(cgroup, topdown=False):
            with suppress(OSError):
                Path(path).rmdir()
        time.sleep(0.05)
