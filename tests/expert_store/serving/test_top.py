"""``expertd top`` on real daemons: in a terminal, into a pipe, and for programs."""

import fcntl
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from expertd.residency.heat_map import HeatMap
from expertd_client import Client
from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import make_pack
from expertd_testing.watching import expertd
from expertstore.errors import NotFoundError
from tests.expert_store.serving.conftest import RECORD_BYTES

ALTERNATE, BACK = "\x1b[?1049h", "\x1b[?1049l"


class Terminal:
    """``expertd top`` in a pseudo-terminal."""

    def __init__(self, *arguments: object, columns: int = 120, lines: int = 40) -> None:
        self.master, slave = pty.openpty()
        self.resize(columns, lines)
        self.before = termios.tcgetattr(slave)
        self.slave = slave
        environment = {**os.environ, "TERM": "xterm-256color", "COLORTERM": "truecolor"}
        for name in ("COLUMNS", "LINES", "NO_COLOR"):
            environment.pop(name, None)
        self.process = subprocess.Popen(
            [sys.executable, "-m", "expertd", "top", *map(str, arguments)],
            stdin=slave, stdout=slave, stderr=slave, env=environment, start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        )  # fmt: skip
        self.text = self.raw = ""

    def resize(self, columns: int, lines: int) -> None:
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def read_until(self, pattern: str, seconds: float = 15.0) -> str:
        """What was shown up to there, without colours; later calls look behind it."""
        deadline = time.monotonic() + seconds
        while True:
            plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", self.text)
            if found := re.search(pattern, plain, re.DOTALL):
                self.text = ""
                return plain[: found.end()]
            assert time.monotonic() < deadline, f"no {pattern!r} in {plain[-3000:]!r}"
            if select.select([self.master], [], [], 0.1)[0]:
                read = os.read(self.master, 65536).decode(errors="replace")
                self.text += read
                self.raw += read

    def type(self, keys: bytes) -> None:
        os.write(self.master, keys)

    def end(self, seconds: float = 10.0) -> tuple[int, str]:
        """The exit code and the last that it wrote."""
        deadline = time.monotonic() + seconds
        rest = self.text
        while self.process.poll() is None or select.select([self.master], [], [], 0.1)[0]:
            assert time.monotonic() < deadline, rest[-500:]
            if select.select([self.master], [], [], 0.1)[0]:
                rest += os.read(self.master, 65536).decode(errors="replace")
        return self.process.returncode, rest

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.slave)


@contextmanager
def terminal(*arguments: object, columns: int = 120, lines: int = 40) -> Iterator[Terminal]:
    opened = Terminal(*arguments, columns=columns, lines=lines)
    try:
        yield opened
    finally:
        opened.close()


@pytest.fixture(scope="module")
def daemon(pack: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    other = make_pack(tmp_path_factory.mktemp("packs") / "other", layers=2, seed=1)
    settings = tmp_path_factory.mktemp("config") / "config.toml"
    settings.write_text('policy = "aged"\n')  # whose heat is easy to tell
    models = {"m": pack, "other": other}
    with serving(models, ram=12 * RECORD_BYTES, config=settings) as daemon:
        with Client(daemon.socket) as store, store.attach("m") as session:
            for _ in range(3):
                session.acquire(0, [0, 1]).release()
            session.acquire(2, [7]).release()
        yield daemon


def test_heat_of_a_model(daemon: Daemon) -> None:
    with Client(daemon.socket) as client:
        heat = HeatMap.of(client.get_heat("m"))
        assert heat.layers == (0, 1, 2)
        assert heat.heat.shape == (3, 8)
        assert heat.heat[0, 0] == heat.heat[0, 1] == 1.0, "the hottest"
        assert 0 < heat.heat[2, 7] < 1.0
        assert heat.heat.sum() == pytest.approx(2 + heat.heat[2, 7])
        resident = {tuple(map(int, place)) for place in np.argwhere(heat.resident)}
        assert resident == {(0, 0), (0, 1), (2, 7)}
        assert not HeatMap.of(client.get_heat("other")).heat.any()
        with pytest.raises(NotFoundError, match="no model named 'x'"):
            client.get_heat("x")


def test_stats_have_what_it_shows(daemon: Daemon) -> None:
    with Client(daemon.socket) as store, store.attach("m") as session:
        session.acquire(0, [0, 1]).release()
        with Client(daemon.socket) as client:
            told = client.stats()
    (row,) = told["sessions"]
    assert (row["role"], row["host_hits"], row["nvme_misses"]) == ("worker", 2, 0)
    model = told["models"][0]
    assert model["resident_bytes"] == 3 * RECORD_BYTES
    assert model["expert_bytes"] == 24 * RECORD_BYTES
    assert model["working_set_bytes"] == 6 * RECORD_BYTES
    assert (model["fetches"], model["fetch_seconds"] > 0) == (2, True)
    assert told["arena"]["retired"] == told["fetches_waiting"] == told["cut_offs"] == 0


def test_once(daemon: Daemon) -> None:
    done = expertd("top", "--socket", daemon.socket, "--once", "--interval", "0.1")
    assert (done.returncode, done.stderr) == (0, "")
    assert "\x1b" not in done.stdout
    lines = done.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("expertd at ")
    assert re.search(r"RAM +█+░+ 24.0 KiB of 96.0 KiB", done.stdout)
    assert re.search(r"(?m)^m +3/24 ", done.stdout)
    assert re.search(r"(?m)^ +0 @@\.{6}$", done.stdout), "the two hottest of layer 0"
    assert "in RAM, cold -=+*#@ hot" in done.stdout


def test_json(daemon: Daemon) -> None:
    done = expertd("top", "--socket", daemon.socket, "--once", "--json", "--interval", "0.1")
    assert done.returncode == 0
    told = json.loads(done.stdout)
    assert [model["name"] for model in told["stats"]["models"]] == ["m", "other"]
    assert 0.05 < told["rates"]["interval_seconds"] < 10
    assert told["rates"]["models"]["m"]["hit_rate"] is None


def test_a_picture(daemon: Daemon, tmp_path: Path) -> None:
    picture = tmp_path / "top.svg"
    done = expertd("top", "--socket", daemon.socket, "--svg", picture, "--interval", "0.1")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    assert "</svg>" in picture.read_text()


def test_no_daemon(tmp_path: Path) -> None:
    for how in ("--once", "--svg=x.svg"):
        done = expertd("top", "--socket", tmp_path, how)
        assert (done.returncode, done.stdout) == (2, "")
        assert f"No expertd answers at {tmp_path} (no socket in it); start one" in done.stderr


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    """A mistake in its name, for which no waiting helps; in a terminal and for programs."""
    missing = tmp_path / "none"
    with terminal("--socket", missing) as top:
        assert f"No expertd answers at {missing} (there is no such directory)" in top.read_until(
            r"\)"
        )
        assert top.end()[0] == 2
    done = expertd("top", "--socket", missing, "--json")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert "there is no such directory" in done.stderr


def test_in_a_terminal(daemon: Daemon) -> None:
    with terminal("--socket", daemon.socket, "--interval", "0.1") as top:
        shown = top.read_until(r"wanted")
        assert "m: layers down, experts across" in shown
        assert "shown as" not in shown, "all of it fits"
        assert ALTERNATE in top.raw
        top.type(b"\t")
        assert "other: layers down" in top.read_until(r"other: layers down")
        top.type(b"\t")
        top.read_until(r"m: layers down")
        top.resize(60, 20)
        top.process.send_signal(signal.SIGWINCH)
        shown = top.read_until("wanted")  # drawn again, in what 60 columns hold
        assert "…" not in shown
        top.type(b"q")
        code, rest = top.end()
        assert code == 0
        assert BACK in rest
        assert termios.tcgetattr(top.slave) == top.before, "the terminal is as it was"


@pytest.mark.parametrize("how", ["key", signal.SIGINT, signal.SIGTERM])
def test_ends_cleanly(daemon: Daemon, how: signal.Signals | str) -> None:
    with terminal("--socket", daemon.socket, "--interval", "0.1") as top:
        top.read_until("wanted")
        if how == "key":
            top.type(b"\x03")
        else:
            assert isinstance(how, signal.Signals)
            top.process.send_signal(how)
        code, rest = top.end()
        assert code == 0
        assert BACK in rest
        assert "Traceback" not in rest
        assert termios.tcgetattr(top.slave) == top.before


@pytest.mark.parametrize(("columns", "lines"), [(20, 5), (40, 10), (80, 24), (300, 80)])
def test_any_size(daemon: Daemon, columns: int, lines: int) -> None:
    with terminal("--socket", daemon.socket, columns=columns, lines=lines) as top:
        top.read_until("RAM")
        top.type(b"q")
        assert top.end()[0] == 0


def test_waits_for_a_daemon_that_goes_and_comes(pack: Path) -> None:
    with (
        serving({"m": pack}, ram="1MiB") as daemon,
        terminal("--socket", daemon.socket, "--interval", "0.1") as top,
    ):
        top.read_until("m: layers down")
        daemon.kill()
        top.read_until(f"waiting for expertd at {re.escape(str(daemon.socket))}")
        with serving({"n": pack}, ram="1MiB", socket=daemon.socket):
            top.read_until("n: layers down")
            top.type(b"q")
            assert top.end()[0] == 0


def test_a_daemon_that_stands_still_is_told_of(pack: Path) -> None:
    with (
        serving({"m": pack}, ram="1MiB") as daemon,
        terminal("--socket", daemon.socket, "--interval", "0.1") as top,
    ):
        top.read_until("m: layers down")
        daemon.signal(signal.SIGSTOP)
        try:
            top.read_until("it does not answer")
            top.type(b"q")
            assert top.end()[0] == 0
        finally:
            daemon.signal(signal.SIGCONT)


def test_into_a_pipe_frame_after_frame(pack: Path) -> None:
    with serving({"m": pack}, ram="1MiB") as daemon:
        process = subprocess.Popen(
            [sys.executable, "-m", "expertd", "top", "--socket", str(daemon.socket),
             "--interval", "0.1", "--json"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            first, second = (json.loads(process.stdout.readline()) for _ in range(2))
            assert first["stats"]["uptime_seconds"] < second["stats"]["uptime_seconds"]
            daemon.kill()
            assert process.stderr.readline() == f"waiting for expertd at {daemon.socket}\n"
            with serving({"m": pack}, ram="1MiB", socket=daemon.socket):
                while (
                    json.loads(process.stdout.readline())["stats"]["incarnation"]
                    == (first["stats"]["incarnation"])
                ):
                    pass
                process.send_signal(signal.SIGINT)
                _, errors = process.communicate(timeout=10)
            assert (process.returncode, errors) == (0, "")
        finally:
            process.kill()
            process.communicate()
