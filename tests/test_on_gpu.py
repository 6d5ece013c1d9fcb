"""``make gpu-test`` runs what needs a GPU, all of it, each test once."""

import configparser
import importlib.util
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests import on_gpu

ROOT = Path(__file__).parent.parent


def test_every_file_that_needs_a_gpu_is_named() -> None:
    ini = configparser.ConfigParser()
    ini.read(ROOT / "tests/gpu.ini")
    named = set(ini["pytest"]["testpaths"].split())
    needing = {
        str(path.relative_to(ROOT))
        for path in (ROOT / "tests").rglob("test_*.py")
        if "tests.inference.kernels.gpu.gpu import" in path.read_text()
        or "pytest.mark.gpu" in path.read_text()
    }
    assert named == needing - {"tests/test_on_gpu.py"}


@pytest.mark.parametrize("num_tests", [1, 7])
def test_without_xdist_each_test_is_in_one_share(
    num_tests: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    tests = [f"tests/test_a.py::test_{number}[x y]" for number in range(num_tests)]
    shares: list[list[str]] = []

    class Started:
        def __init__(self, command: list[str], **_: Any) -> None:
            shares.append([argument for argument in command if "::" in argument])

        def wait(self) -> int:
            return len(shares[-1]) == 1

    def listed(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        assert "--collect-only" in command
        return subprocess.CompletedProcess(command, 0, "\n".join([*tests, "", "7 tests collected"]))

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(on_gpu.subprocess, "Popen", Started)
    monkeypatch.setattr(on_gpu.subprocess, "run", listed)
    monkeypatch.setattr(on_gpu.os, "cpu_count", lambda: 4)
    code = on_gpu.main([])
    assert sorted(test for share in shares for test in share) == tests
    assert len(shares) == min(4, num_tests)
    assert code == 1


def test_with_xdist_it_shares(monkeypatch: pytest.MonkeyPatch) -> None:
    commands: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 3)

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == "xdist")
    monkeypatch.setattr(on_gpu.subprocess, "run", run)
    monkeypatch.setattr(on_gpu.os, "cpu_count", lambda: 16)
    assert on_gpu.main(["-k", "gather"]) == 3
    (command,) = commands
    assert command[-4:] == ["-n", "10", "-k", "gather"]
