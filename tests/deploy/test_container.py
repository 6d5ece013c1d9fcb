"""The container recipe agrees with the repository, and workers of other namespaces attach."""

import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertd.settings.config import load_config
from expertd.sizes import parse_bytes
from expertd_client import Client
from tests.daemon import serving
from tests.expert_store.serving.watching import eventually, expertd
from tests.handmade import make_pack

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "deploy/container"
LINES = [
    line
    for line in (RECIPE / "Containerfile").read_text().replace("\\\n", "").splitlines()
    if line and not line.startswith("#")
]
# Those that a container of its own has.
NAMESPACES = ["--pid", "--fork", "--mount-proc", "--ipc", "--net", "--uts", "--kill-child"]
WORKER = """
import sys
from pathlib import Path
from expertd.cli.control import Control
from expertd_client import Client
from tests.expert_store.serving.watching import assert_serves
socket = Path(sys.argv[1])
assert_serves(socket)
with Client(socket) as store, store.attach("m"), Control(socket) as control:
    print([session["pid"] for session in control.stats()["sessions"]])
"""


def test_only_known_instructions() -> None:
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "STOPSIGNAL", "HEALTHCHECK"}
    assert {line.split()[0] for line in LINES} <= known | {"ENTRYPOINT", "CMD"}


def test_what_it_copies_is_there_and_complete() -> None:
    copied = [
        source
        for line in LINES
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert all((ROOT / source).exists() for source in copied)
    wheel = re.search(r"(?s)packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text())
    assert wheel is not None
    assert set(re.findall(r'"(\w+)/', wheel[1])) <= set(copied)


def test_its_commands_exist() -> None:
    commands = [re.findall(r'"(.*?)"', line) for line in LINES if "[" in line]
    health, entry, serve = commands
    assert entry == ["expertd"]
    assert serve == ["serve", "--config", "/etc/expertd/expertd.toml"]
    assert health[0] == "expertd"
    assert expertd(*health[1:-1], "/nowhere").returncode == 1


def test_compose_gives_what_the_config_asks_for() -> None:
    services: dict[str, Any] = yaml.safe_load((RECIPE / "compose.yaml").read_text())["services"]
    daemon, worker = services["expertd"], services["worker"]
    config = load_config(ROOT / "deploy/expertd.toml")
    assert parse_bytes(daemon["mem_limit"].replace("g", "GiB")) >= config.ram_bytes + (1 << 30)
    assert daemon["ulimits"]["memlock"] == -1
    assert daemon["build"]["dockerfile"] == "deploy/container/Containerfile"
    for each in (daemon, worker):
        assert f"sockets:{config.socket}" in each["volumes"]
        for volume in each["volumes"]:
            if volume.startswith("."):
                assert (RECIPE / volume.split(":")[0]).exists()
    assert worker["user"].split(":")[1] in next(line for line in LINES if "groupadd" in line)


@pytest.mark.parametrize("user", [[], ["--user", "--map-user=1234"]], ids=["plain", "user"])
def test_a_worker_in_namespaces_of_its_own(user: list[str], tmp_path: Path) -> None:
    unshare = ["unshare", *NAMESPACES, *user]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make namespaces")
    with serving({"m": make_pack(tmp_path / "pack")}) as daemon:
        done = subprocess.run(
            [*unshare, sys.executable, "-c", WORKER, str(daemon.socket)],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        # Its pid means something here only because the daemon has the host's namespace.
        assert re.fullmatch(r"\[[1-9]\d*\]\n", done.stdout)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0


def test_a_pid_that_the_daemon_cannot_see_is_no_number(tmp_path: Path) -> None:
    unshare = ["unshare", *NAMESPACES]
    if subprocess.run([*unshare, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this user may not make namespaces")
    make_pack(tmp_path / "pack")
    with tempfile.TemporaryDirectory(prefix="expertd-") as directory:
        socket = Path(directory) / "s"
        serve = ["serve", "--socket", str(socket), "--ram", "1MiB"]
        serve += ["--model", f"m={tmp_path}/pack"]
        process = subprocess.Popen([*unshare, sys.executable, "-m", "expertd", *serve])
        try:
            eventually(lambda: (socket / "attach.sock").exists())
            with Client(socket) as store, store.attach("m"):
                assert [each["pid"] for each in store.stats()["sessions"]] == [0]
                for command in (["stats"], ["top", "--once"]):
                    shown = expertd(*command, "--socket", socket).stdout
                    row = next(line.split() for line in shown.splitlines() if " worker " in line)
                    assert "-" in row[1:3], shown
        finally:
            process.kill()  # --kill-child
            process.wait(20)
