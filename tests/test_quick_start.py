"""README's quick start, as it stands there, by a user that is not root."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from expertd_testing.hub import serving_hub

ROOT = Path(__file__).parent.parent
COMMANDS = re.findall(
    r"^(expertd? .*|expert-run .*)$",
    (ROOT / "README.md").read_text().split("\n## ")[1],
    re.MULTILINE,
)
AS_USER = [] if os.geteuid() else ["unshare", "--user", "--map-user=1234"]


def test_quick_start(tmp_path: Path) -> None:
    if AS_USER and subprocess.run([*AS_USER, "true"], capture_output=True).returncode:
        pytest.skip("this user may not become another in a namespace of its own")
    runtime = tmp_path / "runtime"
    runtime.mkdir(mode=0o700)
    commands = {line.split()[1]: line.replace("24GiB", "64MiB") for line in COMMANDS}
    assert [*commands] == ["doctor", "pack", "serve", "generate", "stats", "top"]
    commands["top"] += " --once"
    programs = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    environment = os.environ | {"XDG_RUNTIME_DIR": str(runtime), "PATH": programs}
    environment |= {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_OFFLINE": "0"}

    def run(line: str) -> str:
        done = subprocess.run(
            [*AS_USER, "sh", "-c", line],
            cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == 0, (line, done.stderr)
        return done.stdout

    assert "where one may serve" in run(commands["doctor"])
    with serving_hub() as hub:
        hub.repositories["mistralai/Mixtral-8x7B-Instruct-v0.1"] = ROOT / "examples/tiny-mixtral"
        environment["HF_ENDPOINT"] = hub.url
        assert "Next: expertd serve" in run(f"{commands['pack']} --no-optimize")
    with subprocess.Popen(
        [*AS_USER, "sh", "-c", f"exec {commands['serve']}"], cwd=tmp_path, env=environment,
        stdout=subprocess.PIPE, text=True,
    ) as daemon:  # fmt: skip
        try:
            assert daemon.stdout is not None
            assert f"at {runtime}/expertd" in daemon.stdout.readline()
            said = {name: run(commands[name]) for name in ("generate", "stats", "top")}
        finally:
            daemon.terminate()
    assert said["generate"].strip()
    assert "mixtral" in said["stats"]
