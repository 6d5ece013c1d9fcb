"""The daemon that is fuzzed, those who do it, and the honest worker who must not notice."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertd_client import Client
from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import PAGE, make_pack, record
from expertd_testing.raw_worker import RawWorker
from expertd_testing.watching import num_files, rss_bytes
from expertstore.shared.greeting import Greeting, handshake
from expertstore.shared.handshake import INCARNATION_KEY, TOKEN_KEY, Role, rpc_target
from tests.fuzz.budget import MAX_GROWTH_BYTES

RECORD_BYTES = 2 * PAGE
SETTINGS = "stall_seconds = 2.0\nfetch_seconds = 2.0\ndrain_seconds = 0.5\nmax_sessions = 32\n"
HONEST_SECONDS = 20.0
"""For a fetch on a machine that does other things: it takes milliseconds."""


class Target:
    """A daemon with room for eight of the 24 records of model ``m``."""

    def __init__(self, daemon: Daemon, pack: Path) -> None:
        self.daemon, self.pack = daemon, pack
        self._honest = RawWorker(daemon.socket)
        self._channel = grpc.insecure_channel(rpc_target(daemon.socket))
        self._health = health_pb2_grpc.HealthStub(self._channel)
        self._turn = 0

    def check(self) -> None:
        """It is healthy, and serves what the pack holds."""
        health = self._health.Check(health_pb2.HealthCheckRequest(), timeout=HONEST_SECONDS)
        assert health.status == health_pb2.HealthCheckResponse.SERVING
        worker, self._turn = self._honest, self._turn + 1
        layer, expert = self._turn % 3, self._turn % 8
        worker.fetch(layer, [expert], seconds=HONEST_SECONDS)
        seen = worker.read(layer, expert, RECORD_BYTES)
        worker.let_go()
        assert not worker.page.revoked
        assert seen == record(layer, expert)

    def close(self) -> None:
        self._honest.close()
        self._channel.close()


class Culprit:
    """Sessions of every role, attached again when they have ended."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._worker: RawWorker | None = None
        self._others: dict[Role, Greeting] = {}

    @property
    def worker(self) -> RawWorker:
        if self._worker is None or self._worker.page.revoked:
            if self._worker is not None:
                self._worker.close()
            self._worker = RawWorker(self._directory)
        return self._worker

    def credentials(self, who: str) -> tuple[tuple[str, str], ...]:
        """What a caller of that kind says of itself."""
        if who == "worker":
            welcome = self.worker.welcome
            return ((TOKEN_KEY, welcome.token), (INCARNATION_KEY, welcome.incarnation))
        if who in {Role.READER, Role.ADMIN}:
            role = Role(who)
            if role not in self._others:
                self._others[role] = handshake(self._directory, role, "", 10)
            return self._others[role].credentials
        return {
            "nobody": (),
            "stranger": ((TOKEN_KEY, "0" * 32),),
            "late": ((TOKEN_KEY, "0" * 32), (INCARNATION_KEY, "0" * 16)),
            "long": ((TOKEN_KEY, "t" * 4000),),
            "twice": ((TOKEN_KEY, ""), (TOKEN_KEY, "%"), ("x-more", "~")),
        }[who]

    def settle(self) -> None:
        """Gives up what it holds: nobody has to wait for it."""
        if self._worker is not None:
            self._worker.page.released_fetch = 2**64 - 1
            self._worker.page.epoch = self._worker.directory_view.epoch

    def close(self) -> None:
        if self._worker is not None:
            self._worker.close()
        for greeting in self._others.values():
            greeting.close()


@contextmanager
def fuzzed(directory: Path) -> Iterator[tuple[Target, Culprit]]:
    """Both; at the end the daemon's log, memory and descriptors are looked at."""
    pack = make_pack(directory / "pack")
    make_pack(directory / "other", layers=1, experts=2, experts_per_token=1, seed=9)
    config = directory / "config.toml"
    config.write_text(SETTINGS)
    with serving({"m": pack}, ram=8 * RECORD_BYTES, config=config) as daemon:
        with ExitStack() as stack:
            target = Target(daemon, pack)
            stack.callback(target.close)
            culprit = Culprit(daemon.socket)
            stack.callback(culprit.close)
            for _ in range(24):
                target.check()
            before, files = rss_bytes(daemon.pid), num_files(daemon.pid)
            yield target, culprit
            target.check()
            growth = rss_bytes(daemon.pid) - before
            assert growth < MAX_GROWTH_BYTES, f"{growth} bytes"
            assert num_files(daemon.pid) < files + 16
        with Client(daemon.socket) as store:
            deadline = time.monotonic() + 10
            while store.stats()["sessions"]:
                assert time.monotonic() < deadline, "sessions are left"
                time.sleep(0.02)
        assert "unexpected failure" not in daemon.stderr
        assert "Traceback" not in daemon.stderr
