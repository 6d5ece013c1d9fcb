"""A worker that has copies generates what one that shares memory does."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from expertd_client import TlsFiles
from expertd_client.mapping import Mapping
from expertd_inference import load_model
from expertd_inference.process.attachment import attach
from expertd_inference.worker import Worker
from expertd_testing.daemon import Daemon, serving
from expertstore.errors import PackError
from expertstore.pack.manifest import read_manifest
from tests.certificates import Authority, tcp_settings
from tests.inference.greedy import greedy, prompt_of

Make = Callable[..., Any]

COMMAND = [sys.executable, "-c", "from expertd_inference.cli import main; main()"]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def tls(authority: Authority) -> TlsFiles:
    files = authority.issue("worker.lab")
    return TlsFiles(files.ca, files.certificate, files.key)


@pytest.fixture(scope="module")
def config(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "expertd.toml"
    path.write_text(
        "drain_seconds = 0.2\n" + tcp_settings(authority.issue("127.0.0.1"), "worker.lab")
    )
    return path


@pytest.fixture(scope="module")
def daemon(packed: Make, config: Path) -> Iterator[Daemon]:
    with serving({"m": packed("qwen3_moe")}, config=config) as daemon:
        yield daemon


def address(daemon: Daemon) -> str:
    found = re.search(r" listening tcp=(\S+)", daemon.stderr)
    assert found, daemon.stderr
    return f"tcp://{found[1]}"


def least_cache(pack: Path) -> int:
    """What one token uses of a layer: most of a prompt's experts then come in waves."""
    manifest = read_manifest(pack).manifest
    size = max(layout.record_bytes for layout in manifest.layouts)
    return size * max(layer.experts_per_token for layer in manifest.layers)


@pytest.mark.parametrize("cache", ["all", "least"])
def test_the_same_tokens_by_tcp(
    cache: str, daemon: Daemon, tls: TlsFiles, packed: Make, stock: Make
) -> None:
    pack, prompt = packed("qwen3_moe"), prompt_of(30)
    cache_bytes = least_cache(pack) if cache == "least" else None
    model = load_model("m", socket=address(daemon), tls=tls, cache_bytes=cache_bytes)
    try:
        assert greedy(model, prompt, 20) == greedy(stock("qwen3_moe"), prompt, 20)
        session = model.expertd.session
        assert not session.shares_memory
        if cache == "all":
            assert session.remote_misses <= read_manifest(pack).manifest.num_experts
    finally:
        model.expertd.close()


def test_the_same_tokens_where_memory_cannot_be_mapped(
    daemon: Daemon, stock: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*arguments: Any, **options: Any) -> Mapping:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(Mapping, "map", refuse)
    with pytest.warns(UserWarning, match="cannot be mapped"):
        attachment = attach("m", daemon.socket)
    with Worker(attachment) as worker:
        prompt = prompt_of(30)
        assert greedy(worker.model, prompt, 20) == greedy(stock("qwen3_moe"), prompt, 20)
        assert worker.session.remote_misses > 0


def test_a_daemon_that_is_killed_meanwhile(
    packed: Make, stock: Make, config: Path, tls: TlsFiles, tmp_path: Path
) -> None:
    pack, prompt = packed("qwen3_moe"), prompt_of(30)
    said: list[str] = []
    with serving({"m": pack}, config=config) as first:
        where = address(first)
        fixed = tmp_path / "expertd.toml"
        fixed.write_text(config.read_text().replace("127.0.0.1:0", where.removeprefix("tcp://")))
        worker = Worker(attach("m", where, tls=tls, cache_bytes=least_cache(pack)), say=said.append)
        greedy(worker.model, prompt, 2)
        first.kill()
    with serving({"m": pack}, config=fixed), worker:
        assert greedy(worker.model, prompt, 20) == greedy(stock("qwen3_moe"), prompt, 20)
    assert said == ["daemon gone, waiting to re-attach", "re-attached"]


def run(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, "generate", *map(str, arguments), "-p", "def f(x):", "--max-new-tokens", "9"],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_the_command_on_a_host_that_has_only_the_trunk(
    packed: Make, config: Path, tls: TlsFiles, tmp_path: Path
) -> None:
    pack = packed("example")
    files = ["--tls-ca", tls.ca, "--tls-cert", tls.certificate, "--tls-key", tls.key]
    trunk = tmp_path / "trunk"
    shutil.copytree(pack, trunk, ignore=shutil.ignore_patterns("experts-*"))
    with serving({"m": pack}, config=config) as daemon:
        local = run("--socket", daemon.socket, "--json")
        remote = run("--socket", address(daemon), *files, "--pack", trunk, "--json")
        assert (remote.returncode, remote.stderr) == (0, "")
        here, there = json.loads(local.stdout), json.loads(remote.stdout)
        assert there["tokens"] == here["tokens"]
        assert there["remote_misses"] > 0
        assert here["remote_misses"] == there["nvme_misses"] == 0
        for arguments, says in (
            (["--socket", address(daemon), *files[:4]], "belong together"),
            (["--socket", address(daemon), *files, "--cache", "lots"], "--cache: "),
            (["--socket", address(daemon), *files, "--cache", "4KiB"], "cache_bytes is 4.0 KiB"),
            (["--socket", address(daemon)], "wants TLS"),
        ):
            done = run(*arguments)
            assert done.returncode == 2
            assert done.stderr.startswith("expert-run: ")
            assert done.stderr.count("\n") == 1
            assert says in done.stderr


def test_without_the_pack_on_this_host(
    packed: Make, config: Path, tls: TlsFiles, tmp_path: Path
) -> None:
    pack = tmp_path / "pack"
    shutil.copytree(packed("example"), pack)
    with serving({"m": pack}, config=config) as daemon:
        pack.rename(tmp_path / "elsewhere")
        with (
            attach("m", address(daemon), tls=tls) as attachment,
            pytest.raises(PackError, match=r"copy the daemon's .*--pack DIR"),
        ):
            Worker(attachment)
