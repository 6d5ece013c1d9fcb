"""What the command begins before it knows what it was asked for."""

import subprocess
import sys

import pytest

from expertd_inference import cli
from expertd_inference.cli import commands
from expertd_inference.process import fork_server


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("serve", True),
        ("serve --embedded pack --decode-graphs off", True),
        ("serve --device cuda:0", False),
        ("serve --port 0 --device=cuda:0", False),
        ("serve --help", False),
        ("serve -h", False),
        ("generate --model serve", False),
        ("", False),
    ],
)
def test_only_a_server_on_the_cpu_has_its_imports_begun(arguments: str, expected: bool) -> None:
    assert cli.serves_on_cpu(arguments.split()) == expected


@pytest.mark.parametrize("name", ["serve", "generate"])
def test_imports_begin_first_and_end_with_the_command(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    called: list[str] = []

    def run() -> None:
        called.append("run")
        raise SystemExit(2)

    monkeypatch.setattr(sys, "argv", ["expert-run", name])
    monkeypatch.setattr("expertstore.interrupts.end_at_once", lambda: called.append("signals"))
    monkeypatch.setattr(fork_server, "start_imports", lambda: called.append("start"))
    monkeypatch.setattr(fork_server, "stop_imports", lambda: called.append("stop"))
    monkeypatch.setattr(commands, "run", run)
    with pytest.raises(SystemExit):
        cli.main()
    around = (["start"], ["stop"]) if name == "serve" else ([], [])
    assert called == ["signals", *around[0], "run", *around[1]]


def test_imports_can_be_ended_in_their_midst() -> None:
    script = """
import os, signal
from multiprocessing import forkserver
from expertd_inference.process.fork_server import start_imports, stop_imports
stop_imports()
start_imports()
pid = forkserver._forkserver._forkserver_pid
stop_imports()
print(os.WTERMSIG(os.waitpid(pid, 0)[1]) == signal.SIGTERM)
"""
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.stdout, done.stderr) == ("True\n", "")
