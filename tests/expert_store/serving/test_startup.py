"""How a daemon starts, refuses to, and stops."""

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from bench.memory_limit import MemoryLimit, NoLimitError
from expertd_client import Client
from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import make_pack
from expertd_testing.patience import HANG_SECONDS
from expertd_testing.raw_worker import Caller, RawWorker
from expertd_testing.watching import assert_serves, cpu_seconds, eventually, expertd
from expertstore.errors import DeadlineError, ExpertdError, UnavailableError
from expertstore.shared.handshake import ATTACH_SOCKET
from expertstore.v1 import expert_store_pb2 as pb
from tests.expert_store.serving.conftest import RECORD_BYTES


def sockets(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.glob("*.sock"))


def refusal(tmp_path: Path, *arguments: object, ram: str = "1MiB", served: str = "s") -> str:
    """What a daemon says that refuses to start; it leaves no socket."""
    done = expertd("serve", "--socket", tmp_path / served, "--ram", ram, *arguments)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("expertd: ")
    assert done.stderr.endswith(".\n")
    assert sockets(tmp_path / served) == []
    return done.stderr


def test_says_in_one_line_what_it_serves(pack: Path) -> None:
    with serving({"m": pack}, ram="1MiB") as daemon:
        assert daemon.stdout.count("\n") == 1
        for piece in ("m (24 experts, 192.0 KiB", str(pack), str(daemon.socket), "arena 1.0 MiB"):
            assert piece in daemon.stdout
        assert sockets(daemon.socket) == ["attach.sock", "rpc.sock"]
        assert {path.stat().st_mode & 0o777 for path in daemon.socket.glob("*.sock")} == {0o660}
        assert daemon.terminate() == 0
        assert sockets(daemon.socket) == []


def test_logs_an_object_a_line_if_told_to(pack: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('log_format = "json"\n')
    with serving({"m": pack}, ram="1MiB", config=config) as daemon:
        assert_serves(daemon.socket)
        assert daemon.terminate() == 0
        events = [json.loads(line) for line in daemon.stderr.splitlines()]
    names = [event["event"] for event in events]
    assert [name for name in names if name != "degraded"] == [
        "model loaded", "serving", "attached", "stopping",
    ]  # fmt: skip
    loaded = events[names.index("model loaded")]
    assert loaded["fields"].pop("disk").startswith("read ")
    assert loaded["fields"] == {"model": "m", "path": str(pack), "experts": 24}


def test_takes_over_from_a_killed_daemon(pack: Path) -> None:
    with serving({"m": pack}, ram="1MiB") as daemon:
        daemon.kill()
        assert sockets(daemon.socket) == ["attach.sock", "rpc.sock"]
        with serving({"m": pack}, ram="1MiB", socket=daemon.socket) as successor:
            assert_serves(successor.socket)


def test_directory_of_a_live_daemon(roomy: Daemon, pack: Path) -> None:
    done = expertd("serve", "--socket", roomy.socket, "--ram", "1MiB", "--model", f"m={pack}")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert f"pid {roomy.pid}" in done.stderr
    assert str(roomy.socket) in done.stderr
    assert_serves(roomy.socket)


def test_budget_below_one_token(pack: Path, tmp_path: Path) -> None:
    # 3 layers of 2 experts of 8 KiB.
    says = refusal(tmp_path, "--model", f"m={pack}", ram="47KiB")
    assert "one token of 'm' uses 48.0 KiB" in says
    assert "give --ram 48KiB or more" in says


def test_more_ram_than_the_host_has(tmp_path: Path) -> None:
    assert "100000.0 TiB" in refusal(tmp_path, ram="100000TiB")


def test_more_ram_than_the_control_group_has(tmp_path: Path) -> None:
    """Refused in a sentence, where the kernel would kill the daemon: whichever version counts."""
    try:
        with MemoryLimit("expertd-test") as limit:
            limit.set(300 << 20)
            serve = [sys.executable, "-m", "expertd", "serve", "--ram", "400MiB", "--socket"]
            done = subprocess.run(
                ["sh", "-c", f'echo $$ >"{limit.joined_by}" && exec "$@"', "sh", *serve,
                 str(tmp_path / "s")],
                capture_output=True, text=True, check=False, timeout=60,
            )  # fmt: skip
    except NoLimitError as error:
        pytest.skip(str(error))
    assert done.returncode == 2, done.stderr
    assert "400.0 MiB" in done.stderr
    assert "only 300.0 MiB here (RAM, and the cgroup's limit); give a smaller --ram." in done.stderr


@pytest.mark.parametrize(
    ("flaw", "says"),
    [
        ("missing", "has no pack.json"),
        ("no pack", "not an expertd pack"),
        ("version", "version 7"),
        ("no experts", "experts-00000.safetensors cannot be read"),
        ("fifo", "it is not a regular file"),
    ],
)
def test_unusable_pack(flaw: str, says: str, tmp_path: Path) -> None:
    path = tmp_path / "pack"
    if flaw != "missing":
        make_pack(path)
    manifest = path / "pack.json"
    if flaw == "no pack":
        manifest.write_text('{"model_type": "llama"}')
    elif flaw == "version":
        text = manifest.read_text()
        assert '"format_version": 2' in text
        manifest.write_text(text.replace('"format_version": 2', '"format_version": 7'))
    elif flaw == "no experts":
        (path / "experts-00000.safetensors").unlink()
    elif flaw == "fifo":
        manifest.unlink()
        os.mkfifo(manifest)
    told = refusal(tmp_path, "--model", f"m={path}")
    assert says in told
    assert str(path) in told


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--model", "pack"], "--model NAME=PACK"),
        (["--model", "m="], "--model NAME=PACK"),
        (["--model", "a/b=/pack"], "cannot name a model"),
        (["--model", "m=/a", "--model", "m=/b"], "same name"),
        (["--ram", "lots"], "not a size"),
        (["--ram", "0"], "give the budget"),
        (["--config", "/nowhere.toml"], "/nowhere.toml cannot be read"),
        (["--model", os.fsdecode(b"m=/p\xff")], "is not UTF-8"),
    ],
)
def test_unusable_arguments(arguments: list[str], says: str, tmp_path: Path) -> None:
    assert says in refusal(tmp_path, *arguments)


def test_unknown_setting(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("stall_second = 3\n")
    says = refusal(tmp_path, "--config", config)
    assert "'stall_second'" in says
    assert "stall_seconds" in says


def test_unknown_group(tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text('allowed_groups = ["nobody-has-this"]\n')
    says = refusal(tmp_path, "--config", config)
    assert "allowed_groups names 'nobody-has-this'" in says
    assert "groupadd" in says


@pytest.mark.parametrize("terminal", [False, True])
def test_hangup(terminal: bool) -> None:
    """A service is not ended by what other daemons reload at; one at a terminal goes with it."""
    with tempfile.TemporaryDirectory(prefix="expertd-") as private, ExitStack() as stack:
        command = [sys.executable, "-m", "expertd", "serve", "--socket", f"{private}/s"]
        command = [sys.executable, "-c", TAKE_TERMINAL, *command] if terminal else command
        ours, theirs = os.openpty()
        process = stack.enter_context(
            subprocess.Popen(
                [*command, "--ram", "1MiB"],
                stdin=theirs,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
                start_new_session=True,
            )
        )
        os.close(theirs)
        try:
            eventually(lambda: (Path(private) / "s/attach.sock").exists())
            if terminal:
                os.close(ours)
                ours = -1
                assert process.wait(20) == 0
            else:
                process.send_signal(signal.SIGHUP)
                time.sleep(0.3)
                process.terminate()
                assert process.wait(20) == 0
                assert process.stderr is not None
                assert process.stderr.read().count("SIGHUP ignored") == 1
        finally:
            process.kill()
            if ours >= 0:
                os.close(ours)


TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execv(sys.argv[1], sys.argv[1:])
"""


def test_directory_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "s").write_text("")
    assert "cannot be used" in refusal(tmp_path)
    assert "too long" in refusal(tmp_path, served="x" * 100)


def test_stop_while_a_fetch_waits_for_room(pack: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("drain_seconds = 0.5\n")
    with serving({"m": pack}, ram=6 * RECORD_BYTES, config=config) as daemon:
        holder, waiter = RawWorker(daemon.socket), RawWorker(daemon.socket)
        holder.fetch(0, range(6))
        failures: list[ExpertdError] = []

        def wait() -> None:
            try:
                waiter.fetch(1, range(6))
            except ExpertdError as error:
                failures.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
        eventually(lambda: holder.num_nudges > 0)
        began = time.monotonic()
        daemon.signal(signal.SIGTERM)
        daemon.signal(signal.SIGTERM)
        assert daemon.wait() == 0
        # drain_seconds is 0.5; the fetch would wait for 30 s.
        assert time.monotonic() - began < HANG_SECONDS
        daemon.signal(signal.SIGTERM)
        thread.join(HANG_SECONDS)
        assert [type(failure) for failure in failures] in ([UnavailableError], [DeadlineError])
        assert sockets(daemon.socket) == []
        assert "Traceback" not in daemon.stderr
        holder.close()
        waiter.close()


def test_interrupt_stops_it_too(pack: Path) -> None:
    with serving({"m": pack}, ram="1MiB") as daemon, RawWorker(daemon.socket) as worker:
        worker.fetch(0, [0])
        daemon.signal(signal.SIGINT)
        assert daemon.wait() == 0
        assert not worker.page.revoked
        assert sockets(daemon.socket) == []
        assert "Traceback" not in daemon.stderr


def test_a_watcher_does_not_hold_up_the_stop(pack: Path, settings: Path) -> None:
    with serving({"m": pack}, ram="1MiB", config=settings) as daemon, Caller(daemon.socket) as call:
        watching = call.stub.WatchStats(pb.WatchStatsRequest(interval_seconds=0.05))
        next(iter(watching))
        began = time.monotonic()
        assert daemon.terminate() == 0
        assert time.monotonic() - began < HANG_SECONDS
        watching.cancel()


def test_no_torch_and_hardly_any_work_when_idle(roomy: Daemon) -> None:
    libraries = Path(f"/proc/{roomy.pid}/maps").read_text()
    assert "libtorch" not in libraries
    assert "libcuda" not in libraries
    with RawWorker(roomy.socket), RawWorker(roomy.socket):
        before = cpu_seconds(roomy.pid)
        time.sleep(2)
        spent = cpu_seconds(roomy.pid) - before
    assert spent < 0.2


def test_a_core_dump_leaves_the_arena_out(roomy: Daemon) -> None:
    before = dumped_arenas(os.getpid())
    with Client(roomy.socket) as store, store.attach("m"):
        assert dumped_arenas(roomy.pid) == [False]
        # Workers of other tests may still be mapped here.
        assert sorted(dumped_arenas(os.getpid())) == sorted([*before, False])


def dumped_arenas(pid: int) -> list[bool]:
    """For each arena that a process has mapped, whether a core dump would contain it."""
    dumped, ours = [], False
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        if line[0] in "0123456789abcdef":
            ours = "memfd:expertd-arena" in line
        elif ours and line.startswith("VmFlags:"):
            dumped.append("dd" not in line.split())
    return dumped


def test_stop_with_silent_connections(pack: Path) -> None:
    with (
        serving({"m": pack}, ram="1MiB") as daemon,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as silent,
    ):
        silent.connect(str(daemon.socket / ATTACH_SOCKET))
        assert daemon.terminate() == 0
        assert silent.recv(1) == b""


@pytest.mark.parametrize("deaf", ["full disk", "closed pipe"])
def test_serves_though_nobody_can_hear_it(deaf: str, pack: Path) -> None:
    """Where its output goes is not worth the workers' while."""
    with tempfile.TemporaryDirectory(prefix="expertd-") as private, ExitStack() as stack:
        if deaf == "full disk":
            output = os.open("/dev/full", os.O_WRONLY)
        else:
            reading, output = os.pipe()
            os.close(reading)
        stack.callback(os.close, output)
        command = [sys.executable, "-m", "expertd", "serve", "--socket", f"{private}/s"]
        process = stack.enter_context(
            subprocess.Popen(
                [*command, "--ram", "1MiB", "--model", f"m={pack}"], stdout=output, stderr=output
            )
        )
        try:
            eventually(lambda: (Path(private) / "s/attach.sock").exists())
            assert_serves(Path(private) / "s")
            process.terminate()
            assert process.wait(20) == 0
        finally:
            process.kill()
