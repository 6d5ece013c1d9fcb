"""What the files in deploy/ must agree on with the daemon; `make check-deploy` lints the rest."""

import re
import shlex
import tomllib
from pathlib import Path

from expertd.serving.rundir import RunDirectory
from expertd.settings.config import ServeConfig, load_config
from expertd_testing.watching import expertd
from expertstore.shared.handshake import ATTACH_SOCKET

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
SAMPLE = load_config(DEPLOY / "expertd.toml")


def unit(name: str) -> dict[str, list[str]]:
    """The settings of a unit file: key to values, in order."""
    settings: dict[str, list[str]] = {}
    for line in (DEPLOY / "systemd" / name).read_text().splitlines():
        if match := re.fullmatch(r"(\w+)=(.*)", line):
            settings.setdefault(match[1], []).append(match[2])
    return settings


SERVICE, SOCKET = unit("expertd.service"), unit("expertd.socket")


def test_the_command_exists() -> None:
    (command,) = SERVICE["ExecStart"]
    executable, verb, *options = shlex.split(command)
    assert Path(executable).name == "expertd"
    assert options == ["--config", "/etc/expertd/expertd.toml"]
    # Exit code 2 with its own message: it has read verb and option.
    done = expertd(verb, *options)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "/etc/expertd/expertd.toml cannot be read" in done.stderr


def test_a_wrong_setting_is_not_tried_again(tmp_path: Path) -> None:
    (tmp_path / "expertd.toml").write_text("ramm = 3\n")
    done = expertd("serve", "--config", tmp_path / "expertd.toml")
    assert SERVICE["RestartPreventExitStatus"] == [str(done.returncode)]


def test_sockets_lie_where_the_config_says() -> None:
    (path,) = SOCKET["ListenSequentialPacket"]
    assert path == str(SAMPLE.socket / ATTACH_SOCKET)
    assert SERVICE["RuntimeDirectory"] == [SAMPLE.socket.name]
    assert Path("/run") == SAMPLE.socket.parent
    assert SOCKET["FileDescriptorName"] == ["attach"]
    assert int(SOCKET["SocketMode"][0], 8) == SAMPLE.socket_mode


def test_the_directory_has_one_mode(tmp_path: Path) -> None:
    RunDirectory(tmp_path / "s").close()
    mode = (tmp_path / "s").stat().st_mode & 0o777
    assert int(SERVICE["RuntimeDirectoryMode"][0], 8) == mode
    assert int(SOCKET["DirectoryMode"][0], 8) == mode
    assert "d /run/expertd 0750 expertd expertd" in (DEPLOY / "systemd/tmpfiles.conf").read_text()


def test_limits_suffice_for_the_defaults() -> None:
    assert int(SERVICE["TimeoutStopSec"][0]) > 2 * SAMPLE.drain_seconds
    assert int(SERVICE["LimitNOFILE"][0]) > 3 * SAMPLE.max_sessions + 100
    assert SERVICE["LimitMEMLOCK"] == ["infinity"]
    # The arena, and a directory per model.
    assert int(SERVICE["FileDescriptorStoreMax"][0]) > 32
    assert int(SERVICE["WatchdogSec"][0]) > 10


def test_sample_config_holds_the_defaults() -> None:
    assert ServeConfig(SAMPLE.socket, SAMPLE.ram_bytes, allowed_groups=("expertd",)) == SAMPLE


def test_requirements_are_the_daemons_part_of_the_distributions() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    packs_and_workers = {
        "torch",
        "transformers",
        "accelerate",
        "huggingface-hub",
        "safetensors",
        "gguf",
        "hqq",
    }
    lines = (DEPLOY / "requirements.txt").read_text().splitlines()
    assert [line for line in lines if not line.startswith("#")] == [
        requirement
        for requirement in project["dependencies"]
        if re.split(r"[<>=]", requirement)[0] not in packs_and_workers
    ]
