"""Clients that do what none should: they are refused, and nobody else notices."""

import resource
import socket
import struct
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import grpc
import msgspec
import pytest

from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import record
from expertd_testing.raw_worker import Caller, RawWorker
from expertd_testing.watching import (
    assert_serves,
    cpu_seconds,
    eventually,
    num_files,
    rss_bytes,
)
from expertstore.errors import ExpertdError, InvalidInputError, NotFoundError, PreconditionError
from expertstore.shared.greeting import handshake
from expertstore.shared.handshake import (
    ATTACH_SOCKET,
    MAX_HINTED,
    RPC_SOCKET,
    Refusal,
    Role,
    encode_hint,
)
from expertstore.v1 import expert_store_pb2 as pb
from tests.expert_store.serving.conftest import RECORD_BYTES

PAGE_WORDS = {"epoch": 2, "released_fetch": 3, "num_touches": 4, "num_misses": 5}


@contextmanager
def connected(directory: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as connection:
        connection.settimeout(10)
        connection.connect(str(directory / ATTACH_SOCKET))
        yield connection


@pytest.fixture(autouse=True)
def nothing_unexpected(roomy: Daemon) -> Iterator[None]:
    """Whatever was done to it: it serves others, has no session left, and no bug showed."""
    yield
    assert_serves(roomy.socket)
    with Caller(roomy.socket) as caller:
        eventually(lambda: not caller.stats().sessions)
    assert "unexpected failure" not in roomy.stderr
    assert "Traceback" not in roomy.stderr


def refs(*experts: tuple[int, int]) -> list[pb.ExpertRef]:
    return [pb.ExpertRef(layer=layer, expert=expert) for layer, expert in experts]


def test_lists_that_are_too_long_or_wrong(roomy: Daemon) -> None:
    with RawWorker(roomy.socket) as worker:
        for name, kind in (
            ("Fetch", pb.FetchRequest),
            ("Prefetch", pb.PrefetchRequest),
            ("Pin", pb.PinRequest),
            ("Unpin", pb.UnpinRequest),
        ):
            extra = {"fetch_number": 1} if name == "Fetch" else {}
            with pytest.raises(InvalidInputError, match=r"25 experts are listed.*has 24"):
                worker.call(name, kind(experts=refs(*[(0, 0)] * 25), **extra))
            for layer, expert in ((0, 8), (3, 0), (2**32 - 1, 2**32 - 1)):
                with pytest.raises(NotFoundError, match=f"{layer}"):
                    worker.call(name, kind(experts=refs((layer, expert)), **extra))
        request = pb.ReadRequest(experts=refs(*[(0, 0)] * 25))
        with pytest.raises(grpc.RpcError) as raised:
            list(worker.stub.Read(request, metadata=worker.credentials))
        assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_duplicates_count_once(roomy: Daemon) -> None:
    with RawWorker(roomy.socket) as worker:
        words = worker.fetch(2, [3, 3, 4, 3])
        assert words[0] == words[1] == words[3] != words[2]
        assert worker.read(2, 3, RECORD_BYTES) == record(2, 3)
        request = pb.PinRequest(experts=refs(*[(2, 5)] * 24))
        assert worker.call("Pin", request).num_pinned == 1
        assert worker.call("Unpin", pb.UnpinRequest(experts=request.experts)).num_unpinned == 1


def test_huge_request(roomy: Daemon) -> None:
    before = rss_bytes(roomy.pid)
    with RawWorker(roomy.socket) as worker:
        request = pb.PrefetchRequest(experts=refs((2**31, 2**31)) * 400_000)
        assert request.ByteSize() > 5_000_000
        for _ in range(5):
            with pytest.raises(grpc.RpcError) as raised:
                worker.stub.Prefetch(request, metadata=worker.credentials, timeout=10)
            assert raised.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert rss_bytes(roomy.pid) - before < 20 << 20


@pytest.mark.parametrize(
    "packet",
    [
        b"x",
        b"{}",
        b"\xff\xfe\x00",
        b"[" * 4000,
        b"x" * 100_000,
        b'{"protocol":2,"role":"king"}',
        b'{"protocol":2,"role":"worker","model":"m","more":1}',
        b'{"protocol":99,"role":"worker","model":"m"}',
        b'{"protocol":2,"role":"worker","model":"' + b"m" * 5000 + b'"}',
        b'{"protocol":2,"role":"worker","model":"\\u0000\\ud800%s"}',
    ],
)
def test_garbage_instead_of_a_hello(roomy: Daemon, packet: bytes) -> None:
    with connected(roomy.socket) as connection:
        connection.send(packet)
        refusal = msgspec.json.decode(connection.recv(65536), type=Refusal)
        assert refusal.code in ("INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND")
        assert connection.recv(1) == b""


def test_empty_packet_and_hanging_up(roomy: Daemon) -> None:
    with connected(roomy.socket) as connection:
        connection.send(b"")
        assert connection.recv(1) == b""
    for _ in range(50):
        with connected(roomy.socket):
            pass
    for _ in range(50):
        with connected(roomy.socket) as connection:
            connection.send(b'{"protocol":2,"role":"worker","model":"m"}')


def test_garbage_instead_of_rpc(roomy: Daemon) -> None:
    files = num_files(roomy.pid)
    with ExitStack() as stack:
        for packet in (
            b"",
            b"\x00" * 100_000,
            b"GET / HTTP/1.1\r\n\r\n",
            b"PRI * HTTP/2.0\r\n",
        ) * 20:
            stream = stack.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))
            stream.connect(str(roomy.socket / RPC_SOCKET))
            stream.send(packet)
        assert_serves(roomy.socket)
    eventually(lambda: num_files(roomy.pid) <= files)


@pytest.mark.parametrize(
    "packet",
    [
        b"",
        b"N",
        b"x" * 5000,
        b"H",
        b"H\0\0\0abc",
        b"HINT" + encode_hint([1])[4:],
        encode_hint([0, 10**9]),
        encode_hint(range(MAX_HINTED)) + b"\0" * 4,
        encode_hint([], needed=[0, 10**9]),
        struct.pack("<2sHI", b"H", 2, 0),  # more are needed than are named
    ],
)
def test_a_worker_that_talks_is_put_out(roomy: Daemon, packet: bytes) -> None:
    with RawWorker(roomy.socket, answering=False) as worker:
        worker.connection.send(packet)
        assert worker.ended()
        assert worker.page.revoked


@pytest.mark.parametrize("role", [Role.READER, Role.ADMIN])
def test_hints_are_a_worker_s(roomy: Daemon, role: Role) -> None:
    with handshake(roomy.socket, role, "m" if role is Role.READER else "", 10) as greeting:
        connection = greeting.take_connection()
    with connection:
        connection.send(encode_hint([0]))
        connection.settimeout(10)
        assert connection.recv(1) == b""


def test_hints_without_end(roomy: Daemon) -> None:
    """As fast as they can be sent: the others are served, and so is the last of them."""
    with RawWorker(roomy.socket) as worker, RawWorker(roomy.socket) as other:
        for number in range(5000):
            entries = [(number + step) % 24 for step in range(24)]
            with suppress(BlockingIOError):
                worker.connection.send(encode_hint(entries * 40), socket.MSG_DONTWAIT)
        assert len(other.fetch(0, [1])) == 1
        worker.connection.send(encode_hint([worker.entry(2, 7)]))
        eventually(lambda: worker.read(2, 7, 8) is not None)
        assert_serves(roomy.socket)


def test_fetch_numbers_that_do_not_grow(roomy: Daemon) -> None:
    with RawWorker(roomy.socket) as worker:
        for number in (0, 7, 7, 3):
            if number == 7 and worker.page.released_fetch != 7:
                worker.fetch(0, [0], number=7)
                worker.let_go()
                continue
            with pytest.raises(InvalidInputError, match="last was"):
                worker.fetch(0, [0], number=number)
        worker.fetch(0, [1], number=2**64 - 1)
        with pytest.raises(InvalidInputError):
            worker.fetch(0, [1], number=2**64 - 1)


def test_leases_without_end(roomy: Daemon) -> None:
    """What a worker never releases must not fill the daemon's memory."""
    with RawWorker(roomy.socket) as worker:
        for _ in range(64):
            worker.fetch(0, range(8))
        for _ in range(3):
            with pytest.raises(PreconditionError, match="64 fetches leased; release"):
                worker.fetch(0, [0])
        worker.let_go()
        worker.fetch(0, [0])


def test_lying_session_page(tight: Daemon) -> None:
    with (
        RawWorker(tight.socket) as liar,
        RawWorker(tight.socket) as other,
        Caller(tight.socket) as caller,
    ):
        other.let_go()
        before = caller.stats().models[0]
        words = liar.page._words
        lies = (0, 2**63, 2**64 - 1, 1, 2**33, 5)
        for name in ("epoch", "released_fetch", "num_touches", "num_misses"):
            for value in lies:
                words[PAGE_WORDS[name]] = value
                caller.stats()  # reads the pages
                experts = [lies.index(value), 6, 7]
                other.fetch(1, experts)
                for expert in experts:
                    assert other.read(1, expert, RECORD_BYTES) == record(1, expert)
                other.let_go()
        # A ring full of what is no expert.
        words[PAGE_WORDS["num_touches"]] = words[PAGE_WORDS["num_misses"]] = 0
        caller.stats()
        for index in range(len(liar.page.ring)):
            liar.page.ring[index] = 0x7FFF_FFFF if index % 2 else 0xFFFF_FFFF
        words[PAGE_WORDS["num_touches"]] = 16384
        caller.stats()
        # The head: magic, version, capacity are the daemon's own to know.
        for index in (0, 1, 6, 7):
            words[index] = 2**64 - 1
        caller.stats()
        other.fetch(2, range(6))
        after = caller.stats().models[0]
        assert after.num_resident == 6
        assert after.nvme_misses == before.nvme_misses
    with Caller(tight.socket) as caller:
        eventually(lambda: not caller.stats().sessions)
    assert_serves(tight.socket)
    assert "Traceback" not in tight.stderr


def test_a_page_that_only_pretends_to_move(tight: Daemon) -> None:
    """It never publishes what it should, but something always changes."""
    with RawWorker(tight.socket) as liar, RawWorker(tight.socket) as other:
        liar.fetch(0, range(6))
        stop = time.monotonic() + 5
        request = pb.FetchRequest(experts=refs(*[(1, each) for each in range(6)]), fetch_number=1)
        waiting = other.stub.Fetch.future(request, metadata=other.credentials, timeout=10)
        value = 0
        while not waiting.done():
            assert time.monotonic() < stop, "held up for ever"
            value = 1 - value
            liar.page.epoch = value
            liar.page._words[PAGE_WORDS["num_touches"]] = value
            time.sleep(0.001)
        assert liar.page.revoked
        assert waiting.result().num_missed == 6


def test_silence_and_300_of_it(roomy: Daemon) -> None:
    files, began = num_files(roomy.pid), time.monotonic()
    with ExitStack() as stack:
        silent = [stack.enter_context(connected(roomy.socket)) for _ in range(300)]
        assert_serves(roomy.socket)  # at once, and not when they are given up
        assert num_files(roomy.pid) < files + 100
        assert silent[-1].recv(1) == b""
        assert time.monotonic() - began > 4
        for connection in silent:
            assert connection.recv(1) == b""
    eventually(lambda: num_files(roomy.pid) <= files)


def test_attaching_200_times_leaves_nothing(roomy: Daemon) -> None:
    def attach(times: int) -> None:
        for _ in range(times):
            handshake(roomy.socket, Role.WORKER, "m", 5).close()
        eventually(lambda: not caller.stats().sessions)

    with Caller(roomy.socket) as caller:
        attach(30)
        files, rss = num_files(roomy.pid), rss_bytes(roomy.pid)
        attach(200)
        assert num_files(roomy.pid) == files
        assert rss_bytes(roomy.pid) - rss < 2 << 20


def limit_that_leaves(pid: int, spare: int) -> int:
    """The limit below which so many numbers are free: open ones may lie far above their count."""
    taken = {int(each.name) for each in Path(f"/proc/{pid}/fd").iterdir()}
    return [number for number in range(max(taken) + 99) if number not in taken][spare]


def test_a_daemon_without_descriptors(pack: Path) -> None:
    with serving({"m": pack}, ram="1MiB") as daemon, RawWorker(daemon.socket) as worker:
        worker.fetch(0, [0])
        files = num_files(daemon.pid)
        _, hard = resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE)
        for spare in (0, 1, 2, 3):
            limit = limit_that_leaves(daemon.pid, spare)
            resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (limit, hard))
            with connected(daemon.socket) as connection:
                connection.send(b'{"protocol":2,"role":"worker","model":"m"}')
                before = cpu_seconds(daemon.pid)
                time.sleep(0.2)
                assert cpu_seconds(daemon.pid) - before < 0.1
                worker.let_go()
                assert len(worker.fetch(0, range(8))) == 8
            with pytest.raises(ExpertdError):
                handshake(daemon.socket, Role.WORKER, "m", 0.2)
        resource.prlimit(daemon.pid, resource.RLIMIT_NOFILE, (hard, hard))
        assert_serves(daemon.socket)
        eventually(lambda: len(worker.stats().sessions) == 1)
        eventually(lambda: num_files(daemon.pid) <= files + 1)
        assert "Traceback" not in daemon.stderr
