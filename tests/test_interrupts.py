"""Signals end a command at every moment: no traceback, and nothing is left behind.

A command is started as its user starts it, but says when its first instruction is done: before that
it is Python itself that the signal meets.
"""

import asyncio
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from expertd_testing.daemon import serving
from expertd_testing.handmade import make_pack
from expertd_testing.watching import eventually
from expertstore.interrupts import between_callbacks, end_at_once, importing, interruptible

ROOT = Path(__file__).parent.parent
EXAMPLE = ROOT / "examples/tiny-mixtral"
BEGUN = (
    # Whoever runs the tests in the background ignores SIGINT, and so would what they start.
    "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
    " from expertstore.interrupts import end_at_once; end_at_once();"
    " sys.stderr.write('begun\\n'); sys.stderr.flush();"
    " from {}.cli import main; main()"
)


def start(program: str, *arguments: str | Path, scratch: Path) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", BEGUN.format(program), *map(str, arguments)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"TMPDIR": str(scratch)},
    )  # fmt: skip
    assert process.stderr is not None
    assert process.stderr.readline() == "begun\n"
    return process


def end(process: subprocess.Popen[str], number: int) -> str:
    """Sends the signal; what the process said in the end."""
    process.send_signal(number)
    _, errors = process.communicate(timeout=60)
    assert process.returncode in (-number, 128 + number)
    assert "Traceback" not in errors
    assert "Error" not in errors
    return errors


def maps(process: subprocess.Popen[str], library: str) -> Callable[[], bool]:
    """Whether it has loaded the library so far."""
    return lambda: library in Path(f"/proc/{process.pid}/maps").read_text()


def is_gone(scratch: Path) -> bool:
    """Whether no process works there any more."""
    return not any(
        str(scratch).encode() in file.read_bytes()
        for file in Path("/proc").glob("[0-9]*/cmdline")
        if file.exists()
    )


LIBRARIES = ("", "libtorch_cpu", "libtorch_python", "_safetensors_rust")
"""That are loaded one after the other while torch and transformers are imported."""


def test_while_packing_begins(tmp_path: Path) -> None:
    for library in LIBRARIES:
        process = start("expertd", "pack", EXAMPLE, tmp_path / "pack", scratch=tmp_path)
        eventually(maps(process, library), 60)
        end(process, signal.SIGINT if library != "libtorch_cpu" else signal.SIGTERM)
    assert not (tmp_path / "pack").exists()


def test_while_packing(tmp_path: Path) -> None:
    process = start("expertd", "pack", EXAMPLE, tmp_path / "pack", scratch=tmp_path)
    eventually((tmp_path / "pack.partial/journal").exists, 60)
    assert "the same command goes on where it was" in end(process, signal.SIGINT)
    assert not (tmp_path / "pack").exists()


def test_while_a_worker_loads(tmp_path: Path) -> None:
    make_pack(tmp_path / "pack")
    for library in LIBRARIES[:3]:
        process = start(
            "expertd_inference", "generate", "--embedded", tmp_path / "pack", "-p", "x",
            scratch=tmp_path,
        )  # fmt: skip
        eventually(maps(process, library), 60)
        end(process, signal.SIGTERM if library == "libtorch_cpu" else signal.SIGINT)
    eventually(lambda: is_gone(tmp_path), 20)
    eventually(lambda: not list(tmp_path.glob("expertd-*")), 20)


def test_while_a_host_is_measured(tmp_path: Path) -> None:
    process = start(
        "expertd_inference", "advise", "--model", EXAMPLE, "--dir", tmp_path, scratch=tmp_path
    )
    eventually(lambda: bool(list(tmp_path.glob(".expertd-probe*"))), 60)
    end(process, signal.SIGTERM)
    assert not list(tmp_path.glob(".expertd-probe*"))
    assert is_gone(tmp_path)


def test_while_a_daemon_begins(tmp_path: Path) -> None:
    with serving({}) as daemon:
        for arguments in (
            ("serve", "--socket", tmp_path / "s", "--ram", "256MiB"),
            ("stats", "--socket", daemon.socket),
            ("top", "--socket", daemon.socket),
            ("record", "--socket", daemon.socket, "--model", "m", "--output", tmp_path / "t"),
            ("verify", tmp_path),
            ("replay", tmp_path),
        ):
            end(start("expertd", *arguments, scratch=tmp_path), signal.SIGINT)
        process = start("expertd", "serve", "--socket", tmp_path / "s", "--ram", "4GiB",
                        scratch=tmp_path)  # fmt: skip
        eventually((tmp_path / "s/lock").exists, 60)
        end(process, signal.SIGTERM)
    assert not (tmp_path / "t").exists()


@pytest.fixture(autouse=True)
def handlers() -> object:
    before = {number: signal.getsignal(number) for number in (1, 2, 15)}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_what_was_begun_is_put_away(number: signal.Signals) -> None:
    put_away = []

    def work() -> None:
        try:
            signal.raise_signal(number)
        finally:
            put_away.append(signal.getsignal(number))
            raise BufferError("exported pointers exist")

    with pytest.raises(SystemExit) as ended, interruptible():
        work()
    assert ended.value.code == 128 + number
    assert put_away == [signal.SIG_DFL], "a second one ends it at once"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_an_event_loop_takes_signals_between_callbacks(number: signal.Signals) -> None:
    steps: list[object] = []

    async def work() -> None:
        with between_callbacks(asyncio.get_running_loop()):
            try:
                signal.raise_signal(number)
                steps.append("went on")
                await asyncio.sleep(60)
            finally:
                steps.append(signal.getsignal(number) is signal.SIG_DFL)

    with pytest.raises(SystemExit) as ended, interruptible():
        asyncio.run(work())
    assert ended.value.code == 128 + number
    # asyncio's own handler of SIGINT is not there: the command has one already.
    assert steps == ["went on", True], "a second one ends it at once"


def test_an_event_loop_gives_signals_back() -> None:
    async def work() -> None:
        before = signal.getsignal(signal.SIGTERM)
        with between_callbacks(asyncio.get_running_loop()):
            assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGTERM) is before

    with interruptible():
        asyncio.run(work())


def test_other_errors_are_what_they_are() -> None:
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(ValueError, match="x"), interruptible():
        raise ValueError("x")
    assert signal.getsignal(signal.SIGINT) is before


def test_imports_end_at_once(capsys: pytest.CaptureFixture[str]) -> None:
    with interruptible():
        inside = signal.getsignal(signal.SIGINT)
        with importing("torch"):
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
        assert signal.getsignal(signal.SIGINT) is inside
    assert capsys.readouterr().err == "", "only a terminal is told"


def test_what_the_starter_ignores_stays_ignored() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_at_once()
    with interruptible():
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
