"""The units under a real systemd: sandboxed, restarted, and with workers of other users."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from expertd_testing.handmade import make_pack
from tests.deploy.machine import ROOT, Machine, UnbootableError, booted

UID = 4321  # a worker's
CONFIG = """
socket = "/run/expertd"
ram = "4MiB"
allowed_groups = ["expertd"]
[models]
m = "/var/lib/expertd/m"
"""
WORKER = """
from pathlib import Path
from expertd_testing.watching import assert_serves
assert_serves(Path("/run/expertd"))
"""
WAITING_WORKER = """
import sys
from expertd_client import Client
with Client("/run/expertd") as store, store.attach("m") as session:
    session.acquire(0, [0]).release()
    print("attached", flush=True)
    sys.stdin.readline()
    session.reattach(60)
    session.acquire(0, [0]).release()
    print("attached again", flush=True)
    sys.stdin.readline()
"""
TOLD_WORKER = """
from expertd_client import Client, UnavailableError
try: Client("/run/expertd").attach("m")
except UnavailableError as error: print(error)
"""
DROP_IN = "/run/systemd/system/expertd.service.d/test.conf"
SMALL_HOST = r"[Service]\nBindReadOnlyPaths=/opt/shared/meminfo:/proc/meminfo"
MEMINFO = "MemTotal: 8192 kB\nMemAvailable: {} kB\n"
MAPPED = "grep -l memfd:expertd-arena /proc/[0-9]*/maps"
SCRAPE = r"""
exec 3<>/dev/tcp/127.0.0.1/9464
printf 'GET /metrics HTTP/1.0\r\n\r\n' >&3
cat <&3
"""


# What installing makes, without the backups of passwd and group that other tools leave.
LISTING = (
    r"find /etc /run /usr/lib/systemd \( -path '*expertd*' -o -path '/etc/*' ! -type d \) "
    "! -name '*-' ! -name .pwd.lock | sort"
)


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    """A host on which expertd is installed as docs/install.md says, and serves."""
    shared = tmp_path_factory.mktemp("machine")
    make_pack(shared / "pack", record_bytes=1 << 16)
    (shared / "expertd.toml").write_text(CONFIG)
    try:
        with booted(shared) as machine:
            # /opt/expertd is there already, since "The program" takes a network.
            (shared / "before").write_text(machine.run(LISTING).stdout)
            machine.run(f"set -e; cd /opt/source\n{documented('The service')}")
            machine.run("cp /opt/shared/expertd.toml /etc/expertd/expertd.toml")
            machine.run("cp -r /opt/shared/pack /var/lib/expertd/m")
            started = machine.run(f"set -e; {documented('Start and check')}", check=False)
            assert started.returncode == 0, started.stderr + machine.journal("expertd")
            assert "active (running)" in started.stdout
            assert "\nserving\n" in started.stdout
            yield machine
    except UnbootableError as error:
        pytest.skip(str(error))


def documented(section: str, after: str = "") -> str:
    """The commands in a section of docs/install.md, the first ones that come after a text."""
    text = (ROOT / "docs/install.md").read_text()
    found = re.search(rf"(?ms)^## {section}$.*?{after}.*?^```\n(.*?)^```$", text)
    assert found is not None, section
    return found[1]


def status(machine: Machine) -> dict[str, str]:
    """/proc's view of the daemon's process."""
    text = machine.run(f"cat /proc/{machine.show('expertd', 'MainPID')}/status").stdout
    return dict(line.split(":\t", 1) for line in text.splitlines() if ":\t" in line)


def work(machine: Machine, uid: int = UID, groups: str = "expertd") -> str:
    """A worker's run as that user; what it complains of."""
    _, stderr = machine.python(uid, groups, WORKER).communicate(timeout=60)
    return stderr


def stats(machine: Machine) -> dict[str, Any]:
    report: dict[str, Any] = json.loads(
        machine.run("/opt/expertd/bin/expertd stats --socket /run/expertd --json").stdout
    )
    return report


def test_runs_in_its_sandbox(machine: Machine) -> None:
    seen = status(machine)
    assert (seen["Seccomp"], seen["NoNewPrivs"]) == ("2", "1")
    assert {int(seen[name], 16) for name in ("CapPrm", "CapEff", "CapBnd", "CapAmb")} == {0}
    assert seen["Uid"].split()[0] == machine.run("id -u expertd").stdout.strip()
    pid = machine.show("expertd", "MainPID")
    for kind in ("net", "mnt", "ipc"):
        ours, own = (machine.run(f"readlink /proc/{who}/ns/{kind}").stdout for who in (pid, 1))
        assert ours != own
    # Root may write wherever the file system may be written to.
    places = "/ /etc/expertd /var/lib/expertd /home /opt /sys/fs/cgroup /run/expertd"
    writable = machine.run(
        f"nsenter -t {pid} -m -r bash -c 'for d in {places}; do [ -w $d ] && echo $d; done; true'"
    )
    assert writable.stdout.split() == ["/run/expertd"]


def test_the_journal_has_times_and_priorities_once(machine: Machine) -> None:
    lines = machine.journal("expertd").splitlines()
    assert any(line.startswith("expertd: model loaded model=m") for line in lines)


def test_workers_of_the_group_attach_and_no_others(machine: Machine) -> None:
    for uid in (UID, UID + 1):
        assert work(machine, uid) == ""
        assert "join the group" in work(machine, uid, groups="65534")
    modes = machine.run("stat -c '%a %U %G' /run/expertd /run/expertd/*.sock").stdout
    assert modes.splitlines() == ["750 expertd expertd", *["660 expertd expertd"] * 2]


def test_a_kill_is_followed_by_a_restart(machine: Machine) -> None:
    before = machine.show("expertd", "NRestarts")
    pid = machine.show("expertd", "MainPID")
    machine.run(f"kill -KILL {pid}")
    machine.until(
        lambda: (
            machine.show("expertd", "NRestarts") != before
            and machine.show("expertd", "ActiveState") == "active"
        ),
        "the restart",
    )
    assert work(machine) == ""


def test_a_stopped_daemon_comes_when_a_worker_attaches(machine: Machine) -> None:
    machine.run("systemctl stop expertd.service")
    assert machine.run("ls /run/expertd").stdout.split() == ["attach.sock", "lock"]
    assert work(machine) == ""
    assert machine.show("expertd", "ActiveState") == "active"


def test_a_wrong_setting_is_one_line_and_no_restart(machine: Machine) -> None:
    machine.run("systemctl stop expertd.service expertd.socket")
    machine.run("journalctl --rotate && journalctl --vacuum-time=1s")
    machine.run("sed -i 's/^ram/ramm/' /etc/expertd/expertd.toml")
    try:
        assert machine.run("systemctl start expertd.service", check=False).returncode != 0
        assert machine.show("expertd", "ExecMainStatus") == "2"
        assert machine.show("expertd", "ActiveState") == "failed"
        said = [line for line in machine.journal("expertd").splitlines() if "ramm" in line]
        assert len(said) == 1
        assert said[0].startswith("expertd: /etc/expertd/expertd.toml: unknown setting 'ramm'")
        assert "Traceback" not in machine.journal("expertd")
        # The socket listens meanwhile: who attaches is told where to look, and so is who asks.
        machine.run("systemctl start expertd.socket")
        told, complaint = machine.python(UID, "expertd", TOLD_WORKER).communicate(timeout=60)
        assert complaint == ""
        assert told.startswith("/run/expertd/attach.sock was closed during attach"), told
        asked = machine.run("/opt/expertd/bin/expertd stats --socket /run/expertd", check=False)
        for said in (told, asked.stderr):
            assert "`systemctl status expertd.service` and `journalctl -u expertd.service`" in said
    finally:
        machine.run("sed -i 's/^ramm/ram/' /etc/expertd/expertd.toml")
        machine.run("systemctl reset-failed expertd.service expertd.socket")
        machine.run("systemctl start expertd.socket expertd.service")


def test_tcp_without_a_network_says_what_to_add(machine: Machine) -> None:
    settings = r'[tcp]\nlisten = "127.0.0.1:7443"\nplaintext = true'
    machine.run(f"printf '{settings}' >>/etc/expertd/expertd.toml")
    try:
        assert machine.run("systemctl restart expertd.service", check=False).returncode != 0
        assert machine.show("expertd", "ExecMainStatus") == "2"
        said = "127.0.0.1:7443 cannot be used: Address family .*; give the service a network"
        assert re.search(said, machine.journal("expertd"))
    finally:
        machine.run("cp /opt/shared/expertd.toml /etc/expertd/expertd.toml")
        machine.run("systemctl restart expertd.service")


def test_metrics_take_the_network_that_a_drop_in_opens(machine: Machine) -> None:
    machine.run("sed -i '1i metrics = \"127.0.0.1:9464\"' /etc/expertd/expertd.toml")
    machine.run("ip link set lo up")
    try:
        assert machine.run("systemctl restart expertd.service", check=False).returncode != 0
        assert machine.show("expertd", "ExecMainStatus") == "2"
        assert "not supported by protocol; give the service a network" in machine.journal("expertd")
        machine.run(f"set -e; cd /opt/source; {documented('Start and check', 'Metrics')}")
        assert "expertd_" in machine.run(SCRAPE).stdout
    finally:
        machine.run("sed -i 1d /etc/expertd/expertd.toml; rm -rf /etc/systemd/system/expertd.*.d")
        machine.run("systemctl daemon-reload; systemctl restart expertd.service")


@pytest.mark.parametrize("end", ["systemctl restart expertd.service", "kill -KILL {pid}"])
def test_the_next_daemon_serves_warm(machine: Machine, end: str) -> None:
    assert work(machine) == ""
    resident = stats(machine)["models"][0]["num_resident"]
    assert resident > 0
    pid = machine.show("expertd", "MainPID")
    machine.run("systemctl reset-failed expertd.service")  # its count of restarts
    machine.run(end.format(pid=pid))
    machine.until(
        lambda: (
            machine.show("expertd", "MainPID") not in ("0", pid)
            and machine.show("expertd", "ActiveState") == "active"
        ),
        "the next daemon",
    )
    assert stats(machine)["models"][0]["num_resident"] == resident
    assert work(machine) == ""
    assert stats(machine)["models"][0]["nvme_bytes_read"] == 0


def test_a_cold_restart_waits_for_the_memory_of_the_old_arena(machine: Machine) -> None:
    """As on a host with room for one arena: a worker keeps the old one for a while."""
    machine.run(f"install -D /dev/stdin {DROP_IN} <<< $'{SMALL_HOST}'")
    memory = machine.shared / "meminfo"
    memory.write_text(MEMINFO.format(6144))
    machine.run("systemctl daemon-reload && systemctl restart expertd.service")
    worker = machine.python(UID, "expertd", WAITING_WORKER)
    try:
        assert worker.stdin is not None
        assert worker.stdout is not None
        assert worker.stdout.readline() == "attached\n"
        machine.run("systemctl stop expertd.socket expertd.service")
        assert machine.run(MAPPED, check=False).stdout != ""
        memory.write_text(MEMINFO.format(2048))
        worker.stdin.write("daemon gone\n")
        worker.stdin.flush()
        machine.run("systemctl start --no-block expertd.service")
        machine.until(
            lambda: "waiting for memory" in machine.show("expertd", "StatusText"), "the daemon"
        )
        machine.until(
            lambda: machine.run(MAPPED, check=False).stdout == "", "the end of the mapping"
        )
        memory.write_text(MEMINFO.format(6144))
        machine.until(lambda: machine.show("expertd", "ActiveState") == "active", "the start")
        assert worker.stdout.readline() == "attached again\n"
        assert stats(machine)["models"][0]["adopted_records"] == 0
        # Nobody lets go: that is tried again, and not given up.
        machine.run("systemctl stop expertd.service expertd.socket")
        memory.write_text(MEMINFO.format(2048))
        machine.run("systemctl start --no-block expertd.service")
        machine.until(lambda: machine.show("expertd", "NRestarts") == "1", "the second attempt")
        assert "only 2.0 MiB are free" in machine.journal("expertd")
        memory.write_text(MEMINFO.format(6144))
        machine.until(lambda: machine.show("expertd", "ActiveState") == "active", "its success")
    finally:
        worker.kill()
        worker.communicate()
        machine.run(f"rm {DROP_IN}; systemctl daemon-reload; systemctl restart expertd.service")


def test_a_daemon_that_hangs_is_replaced(machine: Machine) -> None:
    machine.run(f"install -D /dev/stdin {DROP_IN} <<< $'[Service]\\nWatchdogSec=1'")
    machine.run("systemctl daemon-reload && systemctl restart expertd.service")
    try:
        pid = machine.show("expertd", "MainPID")
        machine.run(f"sleep 2.5; test -d /proc/{pid}; kill -STOP {pid}")  # fed until now
        machine.until(
            lambda: (
                machine.show("expertd", "MainPID") not in ("0", pid)
                and machine.show("expertd", "ActiveState") == "active"
            ),
            "the restart by the watchdog",
        )
        assert "Watchdog timeout" in machine.journal("expertd")
        assert work(machine) == ""
    finally:
        machine.run(f"rm {DROP_IN}; systemctl daemon-reload; systemctl restart expertd.service")


def test_nothing_is_left_when_it_is_uninstalled(machine: Machine) -> None:
    """The last: it takes the machine's expertd away."""
    machine.run("useradd alice && usermod --append --groups expertd alice")
    machine.run(f"rm -rf $(dirname {DROP_IN})")  # of the tests before
    machine.run(f"set -e; {documented('Uninstall')}")
    assert "could not be found" in machine.run("systemctl status expertd 2>&1", check=False).stdout
    for kind in ("passwd", "group"):
        assert machine.run(f"getent {kind} expertd", check=False).stdout == ""
    before, after = (machine.shared / "before").read_text(), machine.run(LISTING).stdout
    assert set(after.splitlines()) - set(before.splitlines()) == set()
    assert machine.run("ls /var/lib/expertd").stdout == "m\n"
