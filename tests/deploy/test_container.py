"""The container recipe agrees with the repository, and workers of other namespaces attach."""

import http.server
import re
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from typing import Any

import pytest
import yaml

from expertd.settings.config import load_config
from expertd_client import Client
from expertd_inference.server.serve import ServerSettings
from expertd_testing.daemon import serving
from expertd_testing.handmade import make_pack
from expertd_testing.watching import eventually, expertd
from expertstore.sizes import parse_bytes

ROOT = Path(__file__).parents[2]
RECIPE = ROOT / "deploy/container"


def lines_of(name: str) -> list[str]:
    """The instructions of a Containerfile."""
    text = (RECIPE / name).read_text().replace("\\\n", "")
    return [line for line in text.splitlines() if line and not line.startswith("#")]


LINES = lines_of("Containerfile")
BOTH = ["Containerfile", "Containerfile.worker"]
# Those that a container of its own has.
NAMESPACES = ["--pid", "--fork", "--mount-proc", "--ipc", "--net", "--uts", "--kill-child"]
WORKER = """
import sys
from pathlib import Path
from expertd_client import Client
from expertd_testing.watching import assert_serves
socket = Path(sys.argv[1])
assert_serves(socket)
with Client(socket) as store, store.attach("m"):
    print([session["pid"] for session in store.stats()["sessions"]])
"""


@pytest.mark.parametrize("name", BOTH)
def test_only_known_instructions(name: str) -> None:
    known = {"FROM", "WORKDIR", "COPY", "RUN", "ENV", "USER", "STOPSIGNAL", "HEALTHCHECK"}
    assert {line.split()[0] for line in lines_of(name)} <= known | {"ENTRYPOINT", "CMD", "ARG"}


@pytest.mark.parametrize("name", BOTH)
def test_what_it_copies_is_there_and_complete(name: str) -> None:
    copied = [
        source
        for line in lines_of(name)
        if line.startswith("COPY ") and "--from" not in line
        for source in line.split()[1:-1]
    ]
    assert all((ROOT / source).exists() for source in copied)
    wheel = re.search(r"(?s)packages = \[(.*?)\]", (ROOT / "pyproject.toml").read_text())
    assert wheel is not None
    assert set(re.findall(r'"(\w+)/', wheel[1])) <= set(copied)
    assert "deploy" in copied, "which the wheel holds"


def test_the_worker_s_packages_are_all_of_the_distribution_s() -> None:
    """Unlike the daemon's, which are those of deploy/requirements.txt."""
    installs = [line for line in lines_of("Containerfile.worker") if "pip install" in line]
    assert all("-c constraints.txt" in line and "--no-deps" not in line for line in installs)
    assert installs[-1].endswith(" '.[serve]'")
    assert any(" g++" in line for line in lines_of("Containerfile.worker")), "native kernels"


def test_the_worker_is_in_the_daemon_s_group() -> None:
    worker = lines_of("Containerfile.worker")
    made = [re.findall(r"groupadd --gid (\d+) (\w+)", " ".join(each)) for each in (LINES, worker)]
    assert made[0] == made[1] == [("990", "expertd")]
    assert re.search(r"useradd --uid 1000 --gid 990 .* worker", " ".join(worker))
    assert "USER worker" in worker
    assert 'ENTRYPOINT ["expert-run"]' in worker


def test_its_commands_exist() -> None:
    commands = [re.findall(r'"(.*?)"', line) for line in LINES if "[" in line]
    health, entry, serve = commands
    assert entry == ["expertd"]
    assert serve == ["serve", "--config", "/etc/expertd/expertd.toml"]
    assert health[0] == "expertd"
    assert expertd(*health[1:-1], "/nowhere").returncode == 1


def filled_in(text: str, environment: dict[str, str]) -> str:
    """``${NAME:-default}`` as compose reads it."""
    return re.sub(r"\$\{(\w+):-([^}]*)\}", lambda m: environment.get(m[1], m[2]), text)


def compose(**environment: str) -> dict[str, Any]:
    text = filled_in((RECIPE / "compose.yaml").read_text(), environment)
    assert "$" not in text
    services: dict[str, Any] = yaml.safe_load(text)["services"]
    return services


def test_compose_gives_what_the_config_asks_for() -> None:
    services = compose()
    daemon, worker, server = (services[name] for name in ("expertd", "worker", "server"))
    config = load_config(ROOT / "deploy/expertd.toml")
    assert parse_bytes(daemon["mem_limit"].replace("g", "GiB")) >= config.ram_bytes + (1 << 30)
    assert [each["ulimits"]["memlock"] for each in services.values()] == [-1, -1, -1]
    names = [f"deploy/container/{name}" for name in BOTH]
    assert [each["build"]["dockerfile"] for each in (daemon, worker)] == names
    assert (server["build"], server["user"]) == (worker["build"], worker["user"])
    assert {name for name, each in services.items() if "network_mode" not in each} == {"server"}
    for each in services.values():
        assert f"sockets:{config.socket}" in each["volumes"]
        assert each.get("network_mode", "none") == "none"
        assert (each["read_only"], each["tmpfs"]) == (True, ["/tmp"])
        assert {"ipc", "pid"}.isdisjoint(each), "a worker outlives the daemon, and needs neither"
        for volume in each["volumes"]:
            if volume.startswith("."):
                assert (RECIPE / volume.split(":")[0]).exists()
    user, group = worker["user"].split(":")
    assert f"--gid {group}" in next(line for line in LINES if "groupadd" in line)
    assert any(f"--uid {user}" in line for line in lines_of("Containerfile.worker"))


@pytest.mark.parametrize("environment", [{}, {"MODEL": "qwen", "PACKS": "/packs"}])
def test_compose_serves_a_model_as_it_stands(environment: dict[str, str], tmp_path: Path) -> None:
    """A real daemon takes its words, with the paths of the container put below another root."""
    services = compose(**environment)
    daemon, worker = services["expertd"], services["worker"]
    name = environment.get("MODEL", "mixtral")
    packs = environment.get("PACKS", "/var/lib/expertd")
    for each in (daemon, worker):
        assert f"{packs}:/var/lib/expertd:ro" in each["volumes"]
    if not environment:
        page = (ROOT / "docs/install.md").read_text()
        assert f"{packs}/{name}" in page.partition("## Containers")[2], "where the pack is to lie"
    make_pack(tmp_path / "var/lib/expertd" / name)
    settings = (ROOT / "deploy/expertd.toml").read_text()
    (tmp_path / "etc/expertd").mkdir(parents=True)
    settings = settings.replace("24GiB", "1MiB").replace('["expertd"]', "[]")
    settings = settings.replace("/run/expertd", f"{tmp_path}/s")
    (tmp_path / "etc/expertd/expertd.toml").write_text(settings)
    command = [
        re.sub(r"(^|=)(/(?:etc|var)/)", rf"\1{tmp_path}\2", word) for word in daemon["command"]
    ]
    process = subprocess.Popen(
        [sys.executable, "-m", "expertd", *command], stdout=subprocess.PIPE, text=True
    )
    try:
        assert process.stdout is not None
        assert f" serves {name} (24 experts" in process.stdout.readline()
        # The worker names none: it takes the only one there is, where it looks by default.
        assert worker["command"] == ["generate", "--prompt", "Once upon a time"]
    finally:
        process.terminate()
        process.communicate(timeout=20)


def test_compose_has_a_server_with_keys(tmp_path: Path) -> None:
    """Its words are taken, up to the file of keys, which is not here."""
    services = compose(KEYS="/keys.toml", PORT="127.0.0.1:80")
    server = services["server"]
    assert server["ports"] == ["127.0.0.1:80:8080"]
    assert server["depends_on"] == {"expertd": {"condition": "service_healthy"}}
    command = server["command"]
    keys = command[command.index("--keys") + 1]
    assert f"/keys.toml:{keys}:ro" in server["volumes"]
    state = command[command.index("--state") + 1]
    assert f"state:{state}" in server["volumes"]
    made = next(line for line in lines_of("Containerfile.worker") if "useradd" in line)
    assert f"-o worker -g expertd {state}" in made, "else the volume is root's"
    words = [word.replace(keys, str(tmp_path / "keys.toml")) for word in command]
    done = subprocess.run(
        [str(Path(sys.executable).with_name("expert-run")), *words],
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{tmp_path}/keys.toml" in done.stderr
    assert "--drain-seconds" not in command
    assert int(server["stop_grace_period"].removesuffix("s")) > ServerSettings().drain_seconds
    program, flag, code = server["healthcheck"]["test"][1:]
    assert (program, flag) == ("python", "-c")
    with http.server.HTTPServer(("127.0.0.1", 0), Healthy) as healthy:
        thread = threading.Thread(target=healthy.handle_request)
        thread.start()
        here = code.replace("8080", str(healthy.server_port))
        assert here != code
        subprocess.run([sys.executable, flag, here], timeout=60, check=True)
        thread.join()


class Healthy(http.server.BaseHTTPRequestHandler):
    """A server that is well."""

    def do_GET(self) -> None:
        """To the one path only."""
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()


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
