"""Sessions that have copies: by TCP, and where the daemon's memory cannot be mapped."""

import os
import re
import subprocess
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from expertd_client import (
    CapacityError,
    Client,
    ExpertdError,
    IncarnationError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    RecordLostError,
    Session,
    SharedMemoryWarning,
    TlsFiles,
    UnavailableError,
)
from expertd_client.aio import AsyncClient
from expertd_client.mapping import Mapping
from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import make_pack, record
from expertstore.shared.handshake import Role
from expertstore.sizes import parse_bytes, size_to_give
from tests.certificates import Authority, Files, tcp_settings
from tests.client.conftest import RECORD_BYTES
from tests.client.observing import eventually

RAM = 64 * RECORD_BYTES


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def config(authority: Authority, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "expertd.toml"
    server = authority.issue("127.0.0.1")
    path.write_text("drain_seconds = 0.2\n" + tcp_settings(server, "worker.lab"))
    return path


@pytest.fixture(scope="module")
def tls(authority: Authority) -> TlsFiles:
    return tls_files(authority.issue("worker.lab"))


@pytest.fixture(scope="module")
def secured(pack: Path, config: Path) -> Iterator[Daemon]:
    with serving({"m": pack}, ram=RAM, config=config) as daemon:
        yield daemon


@pytest.fixture
def store(secured: Daemon, tls: TlsFiles) -> Iterator[Client]:
    with Client(address(secured), tls=tls, timeout_seconds=10) as client:
        yield client


def tls_files(files: Files, ca: Path | None = None) -> TlsFiles:
    return TlsFiles(ca or files.ca, files.certificate, files.key)


def address(daemon: Daemon) -> str:
    found = re.search(r" listening tcp=(\S+)", daemon.stderr)
    assert found, daemon.stderr
    return f"tcp://{found[1]}"


def assert_reads(session: Session, layer: int, experts: list[int]) -> None:
    with session.acquire(layer, experts) as lease:
        assert lease.experts == tuple(experts)
        for expert, offset, view in zip(experts, lease.offsets, lease.views, strict=True):
            assert view.readonly
            assert view == record(layer, expert)
            there = memoryview(session._mapping.arena)[offset : offset + RECORD_BYTES]
            assert there == view


# By TCP


def test_looking_around(store: Client) -> None:
    assert [model.name for model in store.list_models()] == ["m"]
    assert store.get_model("m").num_experts == 24
    assert next(store.watch_stats(0.05))["models"]
    (read,) = store.read("m", [(2, 7)])
    assert read.data == record(2, 7)
    with pytest.raises(NotFoundError):
        store.get_model("x")
    with pytest.raises(PermissionDeniedError, match="Unix socket"):
        store.unload_model("m")


def test_a_session_like_any_other(store: Client) -> None:
    with store.attach("m") as session:
        assert not session.shares_memory
        assert session.connected
        assert session.arena_bytes == 24 * RECORD_BYTES
        assert_reads(session, 1, [3, 0, 5])
        assert (session.host_hits, session.nvme_misses, session.remote_misses) == (0, 0, 3)
        assert_reads(session, 1, [5, 3, 6, 6])
        assert (session.host_hits, session.nvme_misses, session.remote_misses) == (2, 0, 5)
        assert session.prefetch([(0, 0)]) == 0
        for refused in (session.pin, session.unpin):
            with pytest.raises(PreconditionError, match="shares the daemon's memory"):
                refused([(0, 0)])
        with pytest.raises(NotFoundError, match="no expert 8"):
            session.acquire(1, [8])
        held = session.acquire(0, [0])
        with pytest.raises(PreconditionError, match="already holds"):
            session.acquire(0, [1])
        held.release()
        (peer,) = store.stats()["peers"]
        assert peer["name"] == "worker.lab"
        assert peer["bytes_read"] >= 5 * RECORD_BYTES
        assert not store.stats()["sessions"]
    with pytest.raises(PreconditionError, match="not attached"):
        session.acquire(0, [0])


def test_the_cache_is_bounded_and_keeps_what_was_used_last(store: Client) -> None:
    with store.attach("m", cache_bytes=4 * RECORD_BYTES + 100) as session:
        assert session.arena_bytes == 4 * RECORD_BYTES
        assert session.model.max_fetch_records == 4
        assert_reads(session, 0, [0, 1, 2, 3])
        assert_reads(session, 0, [0])
        assert_reads(session, 1, [7])  # takes the place of (0, 1)
        assert session.remote_misses == 5
        assert_reads(session, 0, [0, 2, 3])
        assert session.remote_misses == 5
        assert_reads(session, 0, [1])
        assert session.remote_misses == 6
        with pytest.raises(CapacityError, match="holds 4; acquire in waves") as caught:
            session.acquire(2, range(5))
        assert (caught.value.requested, caught.value.available) == (5, 4)
        seen = []
        for lease in session.waves(2, range(8)):
            with lease:
                seen += [bytes(view) for view in lease.views]
        assert seen == [record(2, expert) for expert in range(8)]


def test_what_is_wanted_does_not_make_room_for_what_else_is(store: Client) -> None:
    with store.attach("m", cache_bytes=4 * RECORD_BYTES) as session:
        assert_reads(session, 0, [0, 1, 2, 3])
        (before,) = store.stats()["peers"]
        assert_reads(session, 0, [0, 4])  # 0 is the one unused for longest
        (after,) = store.stats()["peers"]
        assert after["bytes_read"] - before["bytes_read"] == RECORD_BYTES


def test_a_cache_below_a_working_set_is_refused(store: Client) -> None:
    least = size_to_give(2 * RECORD_BYTES)
    with pytest.raises(InvalidInputError, match=rf"cache_bytes is .* give {least} or more"):
        store.attach("m", cache_bytes=2 * RECORD_BYTES - 1)
    with store.attach("m", cache_bytes=parse_bytes(least)) as session:
        assert_reads(session, 0, [0, 1])


async def test_asyncio(secured: Daemon, tls: TlsFiles) -> None:
    async with (
        AsyncClient(address(secured), tls=tls, timeout_seconds=10) as store,
        await store.attach("m", cache_bytes=4 * RECORD_BYTES) as session,
    ):
        assert [read.data async for read in store.read("m", [(0, 1)])] == [record(0, 1)]
        seen = []
        async for lease in session.waves(2, range(8)):
            with lease:
                seen += [bytes(view) for view in lease.views]
        assert seen == [record(2, expert) for expert in range(8)]
        assert (session.shares_memory, session.remote_misses) == (False, 8)
        assert await session.prefetch([(0, 0)]) == 0
        with pytest.raises(PreconditionError, match="copies"):
            await session.pin([(0, 0)])
        with pytest.raises(PermissionDeniedError):
            await store.unload_model("m")


# What is wrong with a connection


@pytest.mark.parametrize("kind", ["sync", "asyncio"])
@pytest.mark.parametrize(
    ("case", "error", "says"),
    [
        ("stranger", PermissionDeniedError, r"other\.lab is not on this expertd's list"),
        ("wrong ca", PreconditionError, "not signed by an authority in the ca file"),
        ("signed elsewhere", PermissionDeniedError, "refuses the certificate .*client_ca"),
        ("expired", PermissionDeniedError, "refuses the certificate .*expired"),
        ("wrong name", PreconditionError, "certificate of tcp://localhost:.* is not for localhost"),
        ("plaintext", PreconditionError, "wants TLS; give tls="),
        ("nobody", UnavailableError, "connection refused"),
        ("unknown host", UnavailableError, "not known"),
    ],
)
async def test_why_there_is_no_connection(
    secured: Daemon,
    authority: Authority,
    tls: TlsFiles,
    tmp_path: Path,
    kind: str,
    case: str,
    error: type[ExpertdError],
    says: str,
) -> None:
    where, files = address(secured), tls
    elsewhere = Authority(tmp_path / "elsewhere")
    if case == "stranger":
        files = tls_files(authority.issue("other.lab"))
    elif case == "wrong ca":
        files = TlsFiles(elsewhere.path, tls.certificate, tls.key)
    elif case == "signed elsewhere":
        files = tls_files(elsewhere.issue("worker.lab"), authority.path)
    elif case == "expired":
        files = tls_files(authority.expired("worker.lab"))
    elif case == "wrong name":
        where = address(secured).replace("127.0.0.1", "localhost")
    elif case == "nobody":
        where = "tcp://127.0.0.1:1"
    elif case == "unknown host":
        where = "tcp://nowhere.invalid:7443"
    given = None if case == "plaintext" else files
    with pytest.raises(error, match=says) as caught:  # noqa: PT012 - two kinds of one thing
        if kind == "sync":
            with Client(where, tls=given, timeout_seconds=10) as store:
                store.attach("m")
        else:
            async with AsyncClient(where, tls=given, timeout_seconds=10) as store:
                await store.attach("m")
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)


def test_the_daemons_certificate_has_expired(
    pack: Path, authority: Authority, tls: TlsFiles, tmp_path: Path
) -> None:
    settings = tmp_path / "expertd.toml"
    settings.write_text(tcp_settings(authority.expired("127.0.0.1"), "worker.lab"))
    with (
        serving({"m": pack}, config=settings) as daemon,
        Client(address(daemon), tls=tls, timeout_seconds=10) as store,
        pytest.raises(PreconditionError, match="has expired; it must be renewed"),
    ):
        store.list_models()


def test_plaintext_on_both_sides_and_on_one(pack: Path, tls: TlsFiles, tmp_path: Path) -> None:
    settings = tmp_path / "expertd.toml"
    settings.write_text('[tcp]\nlisten = "127.0.0.1:0"\nplaintext = true\n')
    with serving({"m": pack}, config=settings) as daemon:
        with Client(address(daemon), timeout_seconds=10) as store, store.attach("m") as session:
            assert_reads(session, 0, [1, 2])
        with (
            Client(address(daemon), tls=tls, timeout_seconds=10) as store,
            pytest.raises(PreconditionError, match="does not speak TLS"),
        ):
            store.list_models()


@pytest.mark.parametrize(
    ("where", "with_tls", "says"),
    [
        ("tcp://store.lab:7443", False, "asks for a certificate"),
        ("tcp://store.lab", True, "is no address"),
        ("tcp://store.lab:http", True, "is no address"),
        ("tcp://:7443", True, "is no address"),
        ("tcp://a/b:7443", True, "is no address"),
        ("/run/expertd", True, "where TLS has no place"),
    ],
)
def test_addresses(tls: TlsFiles, where: str, with_tls: bool, says: str) -> None:
    with pytest.raises(InvalidInputError, match=says):
        Client(where, tls=tls if with_tls else None)


def test_tls_files_of_no_use(tls: TlsFiles, tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match=f"{tmp_path / 'x'} cannot be read: No such file"):
        Client("tcp://store.lab:7443", tls=TlsFiles(tls.ca, tls.certificate, tmp_path / "x"))
    with pytest.raises(InvalidInputError, match="holds no certificate"):
        Client("tcp://store.lab:7443", tls=TlsFiles(tls.key, tls.certificate, tls.key))


# The daemon goes, and comes back


def test_a_daemon_killed_in_mid_stream_and_its_successor(
    config: Path, tls: TlsFiles, tmp_path: Path
) -> None:
    pack = make_pack(tmp_path / "pack", record_bytes=4 << 20)
    fixed = tmp_path / "expertd.toml"
    with serving({"m": pack}, ram=256 << 20, config=config) as daemon:
        where = address(daemon)
        fixed.write_text(config.read_text().replace("127.0.0.1:0", where.removeprefix("tcp://")))
        store = Client(where, tls=tls, timeout_seconds=10)
        session = store.attach("m")
        session.acquire(0, [0]).release()
        stream = store.read("m", [(layer, e) for layer in range(3) for e in range(8)])
        next(stream)
        daemon.kill()
        with pytest.raises(UnavailableError, match="connection refused"):
            list(stream)
        assert session.connected, "nothing was asked of it"
        with session.acquire(0, [0]) as lease:
            assert lease.views[0] == record(0, 0, 4 << 20)
        with pytest.raises(UnavailableError):
            session.acquire(0, [1])
        assert not session.connected
        with pytest.raises(UnavailableError, match=r"within 0\.2 s"):
            session.reattach(0.2)
    before = session.incarnation
    with store, serving({"m": pack}, ram=256 << 20, config=fixed):
        session.reattach(10)
        assert session.connected
        assert session.incarnation != before
        misses = session.remote_misses
        session.acquire(0, [0]).release()
        assert session.remote_misses == misses, "what was copied is good for ever"
        with session.acquire(0, [1]) as lease:
            assert lease.views[0] == record(0, 1, 4 << 20)


def test_a_restart_that_nobody_noticed(
    pack: Path, config: Path, tls: TlsFiles, tmp_path: Path
) -> None:
    fixed = tmp_path / "expertd.toml"
    with serving({"m": pack}, ram=RAM, config=config) as daemon:
        where = address(daemon)
        fixed.write_text(config.read_text().replace("127.0.0.1:0", where.removeprefix("tcp://")))
        store = Client(where, tls=tls, timeout_seconds=10)
        session = store.attach("m")
    other = make_pack(tmp_path / "other", seed=1)
    with store, serving({"m": other}, ram=RAM, config=fixed):
        store.list_models()  # the channel has found the new one
        with pytest.raises(IncarnationError):
            session.acquire(0, [0])
        with pytest.raises(PreconditionError, match="not what it was"):
            session.reattach(10)


def test_another_pack_under_the_same_name(
    pack: Path, config: Path, tls: TlsFiles, tmp_path: Path
) -> None:
    other = make_pack(tmp_path / "other", seed=1)
    with (
        serving({"m": pack}, ram=RAM, config=config) as daemon,
        Client(address(daemon), tls=tls, timeout_seconds=10) as store,
        store.attach("m") as session,
        Client(daemon.socket) as local,
    ):
        assert_reads(session, 0, [0])
        local.unload_model("m")
        local.load_model("m", other)
        with pytest.raises(PreconditionError, match="another pack"):
            session.acquire(0, [1])


def test_a_damaged_record_is_named_and_others_serve(
    config: Path, tls: TlsFiles, tmp_path: Path
) -> None:
    pack = make_pack(tmp_path / "pack")
    with (pack / "experts-00000.safetensors").open("r+b") as file:
        file.seek(4096 + (8 + 2) * RECORD_BYTES + 77)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes((byte ^ 1,)))
    with (
        serving({"m": pack}, ram=RAM, config=config) as daemon,
        Client(address(daemon), tls=tls, timeout_seconds=10) as store,
        store.attach("m") as session,
    ):
        with pytest.raises(RecordLostError, match="layer 1 expert 2") as caught:
            session.acquire(1, [1, 2, 3])
        assert caught.value.experts == ((1, 2),)
        assert_reads(session, 1, [1, 3])


# On the daemon's host, where its memory cannot be mapped


def refuse_to_map(*arguments: Any, **options: Any) -> Mapping:
    raise PermissionError(1, "Operation not permitted")


def test_copies_where_mapping_is_not_permitted(
    roomy: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mapping, "map", refuse_to_map)
    with Client(roomy.socket, timeout_seconds=10) as store:
        with pytest.warns(SharedMemoryWarning, match=r"cannot be mapped here \(Operation not"):
            session = store.attach("m")
        assert not session.shares_memory
        assert_reads(session, 0, [0, 1])
        (told,) = store.stats()["sessions"]
        assert (told["id"], told["role"]) == (session.id, Role.READER)
        assert told["bytes_read"] == 2 * RECORD_BYTES
        session.detach()
        eventually(lambda: not store.stats()["sessions"])


async def test_copies_where_mapping_is_not_permitted_asyncio(
    roomy: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mapping, "map", refuse_to_map)
    async with AsyncClient(roomy.socket, timeout_seconds=10) as store:
        with pytest.warns(SharedMemoryWarning):
            session = await store.attach("m")
        with await session.acquire(0, [3]) as lease:
            assert lease.views[0] == record(0, 3)


def test_such_a_session_notices_that_the_daemon_went_and_finds_the_next(
    mortal: Daemon, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Mapping, "map", refuse_to_map)
    warnings.simplefilter("ignore", SharedMemoryWarning)
    with Client(mortal.socket, timeout_seconds=10) as store, store.attach("m") as session:
        assert_reads(session, 0, [0])
        mortal.kill()
        eventually(lambda: not session.connected)
        with pytest.raises(UnavailableError):
            session.acquire(0, [1])
        with serving({"m": pack}, ram=RAM, socket=mortal.socket):
            session.reattach(10)
            assert_reads(session, 0, [0, 1])
            assert session.remote_misses == 2


@pytest.mark.parametrize("error", [OSError(24, "Too many open files"), ValueError("no page")])
def test_what_the_user_can_mend_is_said(
    roomy: Daemon, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    def fail(*arguments: Any, **options: Any) -> Mapping:
        raise error

    monkeypatch.setattr(Mapping, "map", fail)
    with (
        Client(roomy.socket, timeout_seconds=10) as store,
        pytest.raises((OSError, PreconditionError)),
    ):
        store.attach("m")


LIMITED = """
import resource, sys, warnings
from expertd_client import Client
with Client(sys.argv[1], timeout_seconds=20) as store:
    store.list_models()  # gRPC has its threads
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + (256 << 20), resource.RLIM_INFINITY))
    with store.attach("m", cache_bytes=1 << 20) as session:
        with session.acquire(0, [0, 5]) as lease:
            print(session.shares_memory, len(lease.views[1]), lease.views[1][:8].hex())
"""


def test_a_process_that_may_not_have_so_much_address_space(pack: Path) -> None:
    with serving({"m": pack}, ram=600 << 20) as daemon:
        done = subprocess.run(
            [sys.executable, "-c", LIMITED, str(daemon.socket)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
    assert done.stdout.split() == ["False", str(RECORD_BYTES), record(0, 5)[:8].hex()], done.stderr
    assert "Cannot allocate memory" in done.stderr
    assert done.stderr.count("SharedMemoryWarning") == 1
