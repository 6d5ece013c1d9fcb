"""``expertd load``, ``unload``, ``models`` and ``stats``, as a user runs them, and what they do."""

import json
import os
import signal
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expertd_client import Client
from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import PAGE, make_pack, record
from expertd_testing.raw_worker import Caller, RawWorker
from expertd_testing.watching import (
    assert_serves,
    eventually,
    expertd,
    num_files,
    rss_bytes,
)
from expertstore.errors import (
    CapacityError,
    ExpertdError,
    NotFoundError,
    PackError,
    PreconditionError,
    SessionLostError,
    UnauthenticatedError,
)
from expertstore.socket_directory import how_to_start
from tests.expert_store.serving.conftest import RECORD_BYTES

PATIENT_SECONDS = 3.0


@pytest.fixture(scope="session")
def other_pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Larger records, other bytes."""
    return make_pack(
        tmp_path_factory.mktemp("packs") / "other", layers=2, record_bytes=3 * PAGE, seed=1
    )


@pytest.fixture(scope="module")
def daemon(
    pack: Path, settings: Path, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    # With one loader thread: each takes its buffer only when it first reads.
    config = tmp_path_factory.mktemp("config") / "one.toml"
    config.write_text(settings.read_text() + "loader_threads = 1\n")
    with serving({"m": pack}, ram=32 * RECORD_BYTES, config=config) as daemon:
        yield daemon


@pytest.fixture
def client(daemon: Daemon) -> Iterator[Client]:
    with Client(daemon.socket) as client:
        yield client
        for model in client.list_models():
            if model.name != "m":
                client.unload_model(model.name)


def ran(done: "subprocess.CompletedProcess[str]") -> str:
    assert done.returncode == 0, done.stderr
    return done.stdout


def refused(done: "subprocess.CompletedProcess[str]") -> str:
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1), done
    return done.stderr


def test_commands(daemon: Daemon, other_pack: Path) -> None:
    at = ("--socket", daemon.socket)
    load = ("load", "other", other_pack, *at)
    assert "'fast' is no way to read a pack" in refused(expertd(*load, "--disk-io", "fast"))
    assert ran(expertd(*load, "--disk-io", "mmap")).startswith("loaded other: 16 experts")
    assert "is loaded already" in refused(expertd("load", "other", other_pack, *at))
    listed = json.loads(ran(expertd("models", *at, "--json")))["models"]
    assert [model["name"] for model in listed] == ["m", "other"]
    assert listed[1]["expert_bytes"] == 16 * 3 * PAGE
    with Client(daemon.socket) as store, store.attach("other") as session:
        session.acquire(0, [0, 1]).release()
        shown = ran(expertd("stats", *at)).splitlines()
    assert max(map(len, shown)) <= 80
    rows = [line.split() for line in shown]
    assert ["model", "m", "other"] in rows
    assert ["resident", "0", "of", "24", "2", "of", "16"] in rows
    assert ["NVMe", "misses", "0", "2"] in rows
    (way,) = [row[2:] for row in rows if row[:2] == ["read", "by"]]
    assert way[-1] == "mmap"
    assert way[-2] == "(auto)"
    assert ["page", "cache", "24.0", "KiB"] in [row[:2] + row[-2:] for row in rows]
    assert any(str(other_pack) in line for line in ran(expertd("models", *at)).splitlines())
    assert "unloaded other: 24.0 KiB" in ran(expertd("unload", "other", *at))
    assert "no model named 'other'" in refused(expertd("unload", "other", *at))


def _nobody(directory: Path) -> str:
    return f"No expertd answers at {directory} (no socket in it); {how_to_start(directory)}."


def test_commands_without_a_daemon(tmp_path: Path) -> None:
    said = refused(expertd("stats", "--socket", tmp_path, "--json"))
    assert said == f"expertd: {_nobody(tmp_path)}\n"
    assert str(tmp_path) in refused(expertd("unload", "m", "--socket", tmp_path))


def test_health(daemon: Daemon, tmp_path: Path) -> None:
    assert ran(expertd("health", "--socket", daemon.socket)) == "serving\n"
    silent = expertd("health", "--socket", tmp_path)
    assert (silent.returncode, silent.stdout) == (1, "")
    assert silent.stderr == f"expertd: {_nobody(tmp_path)}\n"
    daemon.signal(signal.SIGSTOP)
    try:
        stuck = expertd("health", "--socket", daemon.socket)
    finally:
        daemon.signal(signal.SIGCONT)
    assert (stuck.returncode, stuck.stdout, stuck.stderr.count("\n")) == (1, "", 1)


def test_load_of_what_cannot_be(client: Client, pack: Path, tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"has no pack\.json"):
        client.load_model("n", tmp_path)
    with pytest.raises(PreconditionError, match="loaded already"):
        client.load_model("m", pack)
    with pytest.raises(ExpertdError, match="cannot name a model"):
        client.load_model("a/b", pack)
    large = make_pack(tmp_path / "large", layers=4, experts_per_token=8)
    with pytest.raises(CapacityError, match=r"one token of 'm' uses 48\.0 KiB") as raised:
        client.load_model("large", large)
    assert raised.value.unit == "bytes"
    assert [model.name for model in client.list_models()] == ["m"]


def test_load_of_what_is_no_pack_s_file(client: Client, pack: Path, tmp_path: Path) -> None:
    """Neither waited for, nor does it keep the next load from its turn."""
    os.mkfifo(tmp_path / "pack.json")
    with pytest.raises(PackError, match=r"pack\.json cannot be read: it is not a regular file"):
        client.load_model("n", tmp_path)
    with pytest.raises(PackError, match=r"has no pack\.json"):
        client.load_model("n", Path("/a\0b"))
    with pytest.raises(PackError, match="not UTF-8"):
        client.load_model("n", Path(os.fsdecode(b"/a\xff")))
    client.load_model("n", pack)
    client.unload_model("n")


def test_unload_ends_the_model_s_sessions(daemon: Daemon, client: Client, other_pack: Path) -> None:
    client.load_model("other", other_pack)
    with (
        Client(daemon.socket) as store,
        store.attach("m") as bystander,
        store.attach("other") as session,
        RawWorker(daemon.socket, "other") as raw,
    ):
        session.acquire(0, [0, 1]).release()
        raw.fetch(1, [3])
        raw.let_go()
        # More than a step is under way: three records, 36 KiB.
        assert client.unload_model("other") == 3 * 3 * PAGE
        eventually(lambda: not session.connected)
        assert raw.page.revoked
        with pytest.raises(SessionLostError):
            session.acquire(0, [0])
        with pytest.raises(NotFoundError, match="loaded are: m"):
            session.reattach(1)
        with pytest.raises(UnauthenticatedError):
            raw.fetch(0, [0])
        bystander.acquire(0, [0]).release()
        assert [each["model"] for each in client.stats()["sessions"]] == ["m"]
    eventually(lambda: not client.stats()["sessions"])


def test_unload_of_a_model_that_is_being_read(pack: Path, other_pack: Path, tmp_path: Path) -> None:
    """Its reader is cut off after stall_seconds; until then nothing of it changes."""
    config = tmp_path / "expertd.toml"
    config.write_text(f"stall_seconds = {PATIENT_SECONDS}\n")
    with (
        serving({"m": pack, "other": other_pack}, ram=32 * RECORD_BYTES, config=config) as daemon,
        RawWorker(daemon.socket, "other") as holder,
        RawWorker(daemon.socket) as bystander,
        Client(daemon.socket) as client,
    ):
        holder.fetch(0, [0, 1])
        thread = threading.Thread(target=client.unload_model, args=("other",))
        began = time.monotonic()
        thread.start()
        while time.monotonic() - began < 0.2 * PATIENT_SECONDS:
            assert not holder.page.revoked
            # Others go on meanwhile, misses too.
            bystander.let_go()
            bystander.fetch(0, [2, 3])
            bystander.let_go()
        with pytest.raises(PreconditionError, match="being unloaded"):
            RawWorker(daemon.socket, "other")
        with pytest.raises(PreconditionError, match="being unloaded already"):
            Client(daemon.socket).unload_model("other")
        thread.join(PATIENT_SECONDS + 5)
        assert holder.page.revoked
        assert time.monotonic() - began >= PATIENT_SECONDS
        assert_serves(daemon.socket)


def test_loading_and_unloading_50_times_leaves_nothing(
    daemon: Daemon, client: Client, other_pack: Path
) -> None:
    def cycle(times: int) -> None:
        for _ in range(times):
            client.load_model("other", other_pack)
            with RawWorker(daemon.socket, "other") as worker:
                worker.fetch(1, range(8))
            client.unload_model("other")

    def used() -> int:
        bytes_used: int = client.stats()["arena"]["bytes_used"]
        return bytes_used

    cycle(5)
    eventually(lambda: not client.stats()["sessions"])
    before, files, rss = used(), num_files(daemon.pid), rss_bytes(daemon.pid)
    cycle(50)
    eventually(lambda: num_files(daemon.pid) <= files)
    assert used() == before
    assert rss_bytes(daemon.pid) - rss < 3 << 20


def test_two_models_with_records_of_two_sizes_share_the_arena(
    pack: Path, other_pack: Path, settings: Path
) -> None:
    # Room for the working sets, 48 + 48 KiB, and little more.
    with serving({"m": pack, "other": other_pack}, ram=112 << 10, config=settings) as daemon:
        failures: list[BaseException] = []

        def work(model: str, layers: int, size: int, seed: int) -> None:
            try:
                with (
                    Client(daemon.socket, timeout_seconds=20) as store,
                    store.attach(model) as session,
                ):
                    for step in range(30):
                        experts = [step % 8, (step + 3) % 8]
                        for layer in range(layers):
                            with session.acquire(layer, experts) as lease:
                                for expert, view in zip(experts, lease.views, strict=True):
                                    assert bytes(view) == record(layer, expert, size, seed)
                        arena = store.stats()["arena"]
                        assert arena["bytes_used"] <= arena["bytes_total"] == 112 << 10
            except BaseException as error:
                failures.append(error)

        threads = [
            threading.Thread(target=work, args=("m", 3, RECORD_BYTES, 0)),
            threading.Thread(target=work, args=("other", 2, 3 * PAGE, 1)),
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(30)
        assert failures == []
        with Client(daemon.socket) as client:
            models = client.stats()["models"]
            assert all(model["evictions"] > 10 for model in models)
            assert [model["record_bytes"] for model in models] == [RECORD_BYTES, 3 * PAGE]
            assert "cut off" not in daemon.stderr


def test_stats_of_a_script(pack: Path, settings: Path) -> None:
    """Every figure of the contract, after accesses that are known one by one."""
    with (
        serving({"m": pack}, ram=6 * RECORD_BYTES, config=settings) as daemon,
        RawWorker(daemon.socket) as worker,
        Caller(daemon.socket) as caller,
    ):
        incarnation = caller.stats().incarnation

        def report() -> dict[str, Any]:
            told: dict[str, Any] = json.loads(
                ran(expertd("stats", "--socket", daemon.socket, "--json"))
            )
            return told

        def resident() -> int:
            return caller.stats().models[0].num_resident

        # Three misses, five hits.
        worker.fetch(0, [0, 1, 2])
        worker.touch(0, [0, 1, 2], missed=[0, 1, 2])
        worker.touch(0, [0, 1, 2, 0, 1])
        worker.let_go()
        # Two hints, one of them used (twice): useful 1.
        assert worker.prefetch(1, [0, 1]) == 2
        eventually(lambda: resident() == 5)
        worker.touch(1, [0])
        worker.touch(1, [0])
        caller.stats()
        # Another six records: everything goes, and the unused hint is wasted.
        worker.fetch(2, range(6))
        worker.touch(2, range(6), missed=range(6))

        told = report()
        assert set(told) >= {"incarnation", "uptime_seconds", "arena", "models", "sessions"}
        assert told["incarnation"] == incarnation
        assert isinstance(told["uptime_seconds"], float)
        assert 0 < told["uptime_seconds"] < 30
        arena = told["arena"]
        assert arena.keys() >= {"bytes_total", "bytes_used", "locked", "huge_pages"}
        assert arena["bytes_total"] == arena["bytes_used"] == 6 * RECORD_BYTES
        assert arena["locked"] in (0, 6 * RECORD_BYTES)
        (model,) = told["models"]
        contract = {
            "name": "m",
            "num_experts": 24,
            "num_resident": 6,
            "record_bytes": RECORD_BYTES,
            "host_hits": 7,
            "nvme_misses": 9,
            "nvme_bytes_read": 11 * RECORD_BYTES,
            "evictions": 5,
            "records_lost": 0,
            "prefetch": {"issued": 2, "useful": 1, "late": 0, "wasted": 1},
            "min_bytes": 0,
            "max_bytes": 0,
            "num_pinned": 0,
            "num_pinned_resident": 0,
            "moves": 0,
        }
        assert {key: model[key] for key in contract} == contract
        (session,) = told["sessions"]
        assert session.keys() >= {"id", "pid", "uid", "model", "attached_seconds", "epoch_lag"}
        assert (session["id"], session["model"]) == (worker.id, "m")
        status = Path("/proc/self/status").read_text()
        assert f"\nPid:\t{session['pid']}\n" in status
        assert f"\nUid:\t{session['uid']}\t" in status
        assert 0 < session["attached_seconds"] < told["uptime_seconds"]
        assert session["epoch_lag"] == 0
        worker.let_go()


def test_misses_that_are_told_late(daemon: Daemon, client: Client) -> None:
    """The worker stores its touches, and is stopped before it stores the misses among them."""

    def counts() -> tuple[int, int]:
        (model,) = client.stats()["models"]
        return model["host_hits"], model["nvme_misses"]

    with RawWorker(daemon.socket) as worker:
        hits, misses = counts()
        worker.page._words[4] += 3
        counts()
        worker.page._words[5] += 2
        assert counts() == (hits + 1, misses + 2)
        worker.page._words[5] += 2  # more than all it did is a lie
        assert counts() == (hits + 1, misses + 2)


def test_a_hint_that_demand_overtakes_is_late(tmp_path: Path) -> None:
    size = 16 << 20  # large enough to be asked for while it is being read
    pack = make_pack(tmp_path / "pack", layers=1, experts=2, experts_per_token=1, record_bytes=size)
    with serving({"m": pack}, ram=2 * size) as daemon, RawWorker(daemon.socket) as worker:
        assert worker.prefetch(0, [1]) == 1
        worker.fetch(0, [1])
        told = worker.stats().models[0].prefetch
        assert (told.issued, told.useful, told.late, told.wasted) == (1, 0, 1, 0)
        assert worker.stats().models[0].nvme_bytes_read == size
        worker.let_go()


def test_limits_of_a_model(daemon: Daemon, client: Client, other_pack: Path) -> None:
    at = ("--socket", daemon.socket)
    sizes = ("--min", "48KiB", "--max", "96KiB", "--pin", "0:0-1", "--pin", "1:7")
    said = ran(expertd("load", "other", other_pack, *at, *sizes))
    assert "3 are pinned and read now" in said

    def other() -> dict[str, Any]:
        (told,) = (each for each in client.stats()["models"] if each["name"] == "other")
        return dict(told)

    eventually(lambda: other()["num_pinned_resident"] == 3)
    told = other()
    assert (told["min_bytes"], told["max_bytes"]) == (48 << 10, 96 << 10)
    assert told["resident_bytes"] == 3 * 3 * PAGE
    rows = [line.split() for line in ran(expertd("stats", *at)).splitlines()]
    assert ["minimum", "-", "48.0", "KiB"] in rows
    assert ["maximum", "-", "96.0", "KiB"] in rows
    assert ["pinned", "-", "3", "of", "3"] in rows
    with Client(daemon.socket) as store, store.attach("other") as session:
        assert session.model.max_fetch_records == (96 // 12) - 3
    assert "keeps 12.0 KiB and may take 96.0 KiB" in ran(
        expertd("limit", "other", *at, "--min", "12KiB")
    )
    assert "may take all that the others leave" in ran(
        expertd("limit", "other", *at, "--max", "none")
    )
    said = refused(expertd("limit", "other", *at, "--min", "100GiB"))
    assert "the minimum of 'other' is 100.0 GiB, and all its experts" in said
    assert "--max is 0; give a size" in refused(expertd("limit", "other", *at, "--max", "0"))
    assert other()["min_bytes"] == 12 << 10
    listed = json.loads(ran(expertd("models", *at, "--json")))["models"][1]
    assert (listed["min_bytes"], listed["max_bytes"], listed["num_pinned"]) == (12 << 10, 0, 3)
    assert "the minimum of 'other'" in refused(expertd("limit", "other", *at, "--min", "1GiB"))
    assert "is not a size" in refused(expertd("limit", "other", *at, "--max", "lots"))
    assert "no model named" in refused(expertd("limit", "another", *at, "--max", "1GiB"))
    client.unload_model("other")
    assert "has no expert 8" in refused(expertd("load", "other", other_pack, *at, "--pin", "0:8"))
