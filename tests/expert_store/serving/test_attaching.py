"""Who may attach, with what they get, and what opens to whom."""

import os
import socket
from itertools import pairwise
from pathlib import Path
from unittest.mock import Mock

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from expertd.serving.allow_list import AllowList
from expertd.serving.attach import AttachServer
from expertd.store import Store
from expertd_testing.daemon import Daemon, serving
from expertd_testing.raw_worker import Caller, RawWorker
from expertd_testing.watching import assert_serves, eventually, python
from expertstore.errors import (
    CapacityError,
    IncarnationError,
    InvalidInputError,
    NotFoundError,
    PermissionDeniedError,
    PreconditionError,
    UnauthenticatedError,
)
from expertstore.shared.greeting import handshake
from expertstore.shared.handshake import Role, rpc_target
from expertstore.v1 import expert_store_pb2 as pb

NOBODY = 65534
FETCH = pb.FetchRequest(experts=[pb.ExpertRef(layer=0, expert=0)], fetch_number=1)
OF_A_SESSION = {
    "Fetch": FETCH,
    "Prefetch": pb.PrefetchRequest(experts=FETCH.experts),
    "Pin": pb.PinRequest(experts=FETCH.experts),
    "Unpin": pb.UnpinRequest(experts=FETCH.experts),
}
OF_AN_ADMIN = {
    "LoadModel": pb.LoadModelRequest(name="n", pack_path="/nowhere"),
    "UnloadModel": pb.UnloadModelRequest(name="m"),
}


def test_unknown_model(roomy: Daemon) -> None:
    with pytest.raises(NotFoundError, match=r"no model named 'other' is loaded; loaded are: m\."):
        RawWorker(roomy.socket, "other")


@pytest.mark.parametrize("name", [*OF_A_SESSION, *OF_AN_ADMIN])
def test_calls_without_a_token(roomy: Daemon, name: str) -> None:
    request = (OF_A_SESSION | OF_AN_ADMIN)[name]
    with Caller(roomy.socket) as nobody, RawWorker(roomy.socket) as worker:
        with pytest.raises(UnauthenticatedError, match="attach first"):
            nobody.call(name, request)
        nobody.credentials = (("expertd-token", "0" * 32), worker.credentials[1])
        with pytest.raises(UnauthenticatedError):
            nobody.call(name, request)
        # The token of a session that has ended is none.
        worker.detach()
        eventually(lambda: worker.id not in [each.id for each in nobody.stats().sessions])
        with pytest.raises(UnauthenticatedError):
            worker.call(name, request)


def test_a_token_of_another_incarnation(roomy: Daemon) -> None:
    with Caller(roomy.socket) as stranger:
        stranger.credentials = (("expertd-token", "0" * 32), ("expertd-incarnation", "f" * 16))
        for name, request in OF_A_SESSION.items():
            with pytest.raises(IncarnationError, match="attach again"):
                stranger.call(name, request)


@pytest.mark.parametrize("name", OF_AN_ADMIN)
def test_admin_calls_of_a_worker(roomy: Daemon, name: str) -> None:
    with RawWorker(roomy.socket) as worker, pytest.raises(PermissionDeniedError, match="admin"):
        worker.call(name, OF_AN_ADMIN[name])
    with (
        handshake(roomy.socket, Role.READER, "", 5) as greeting,
        Caller(roomy.socket, greeting.credentials) as reader,
    ):
        with pytest.raises(PermissionDeniedError):
            reader.call(name, OF_AN_ADMIN[name])
        with pytest.raises(PreconditionError, match="attach to a model"):
            reader.call("Fetch", FETCH)
    assert_serves(roomy.socket)


def test_more_sessions_than_may_attach(pack: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text("max_sessions = 3\n")
    with serving({"m": pack}, ram="1MiB", config=config) as daemon:
        workers = [RawWorker(daemon.socket) for _ in range(3)]
        for _ in range(5):
            with pytest.raises(CapacityError, match="max_sessions"):
                RawWorker(daemon.socket)
        assert len(workers[0].fetch(0, range(8))) == 8
        # Who is to set it right gets in.
        handshake(daemon.socket, Role.ADMIN, "", 5).close()
        workers.pop().close()
        eventually(lambda: len(workers[0].stats().sessions) == 2)
        workers.append(RawWorker(daemon.socket))
        for worker in workers:
            worker.close()


AS_NOBODY = """
import mmap, os, sys
from pathlib import Path
from expertstore.errors import ExpertdError
from expertstore.shared.greeting import handshake
from expertstore.shared.handshake import Role

os.setgroups([])
os.setresgid(65534, 65534, 65534)
os.setresuid(65534, 65534, 65534)
try:
    greeting = handshake(Path(sys.argv[1]), Role[sys.argv[2]], "m", 5)
except ExpertdError as error:
    print(type(error).__name__, error)
    raise SystemExit
print("attached")
for name, descriptor in zip(("arena", "directory"), greeting.descriptors):
    size = os.fstat(descriptor).st_size
    for attempt, call in {
        "map": lambda: mmap.mmap(descriptor, size),
        "reopen": lambda: os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR),
        "read anew": lambda: os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY),
        "chmod": lambda: os.fchmod(descriptor, 0o666),
        "shrink": lambda: os.ftruncate(descriptor, 0),
        "grow": lambda: os.ftruncate(descriptor, 2 * size),
        "write": lambda: os.pwrite(descriptor, b"x", 0),
    }.items():
        try:
            call()
        except OSError:
            continue
        print("could", attempt, name)
"""


@pytest.mark.parametrize(("own", "named"), [(0, set()), (998, set()), (998, {1000})])
def test_whose_workers_could_write(
    own: int, named: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The daemon's own user's, who could anyway; not root's, who may lack the power to."""
    monkeypatch.setattr(os, "geteuid", lambda: own)
    listener = Mock(socket.socket)
    listener.fileno.return_value = -1
    server = AttachServer(Mock(Store), listener, AllowList(), named)
    assert server.writable_uids == {own} | named


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_who_is_named_could_write(pack: Path, tmp_path: Path) -> None:
    config = tmp_path / "config.toml"
    config.write_text(
        f'allowed_uids = [{NOBODY}]\nwritable_uids = [{NOBODY}]\nsocket_mode = "666"\n'
    )
    with serving({"m": pack}, ram="1MiB", config=config) as daemon:
        daemon.socket.chmod(0o755)
        daemon.socket.parent.chmod(0o755)
        out, err = python(AS_NOBODY, daemon.socket, "WORKER").communicate(timeout=20)
    assert (out, err) == ("attached\ncould map arena\ncould write arena\n", "")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user(pack: Path, tmp_path: Path) -> None:
    def attach(allowed: str, role: str = "WORKER") -> str:
        config = tmp_path / "config.toml"
        config.write_text(f'allowed_uids = {allowed}\nsocket_mode = "666"\n')
        with serving({"m": pack}, ram="1MiB", config=config) as daemon:
            daemon.socket.chmod(0o755)
            daemon.socket.parent.chmod(0o755)
            process = python(AS_NOBODY, daemon.socket, role)
            out, err = process.communicate(timeout=20)
            assert err == ""
            assert f"uid={NOBODY}" in daemon.stderr
            return out

    assert attach("[]").startswith(f"PermissionDeniedError uid {NOBODY} may not attach")
    assert attach(f"[{NOBODY}]") == "attached\n"
    assert attach(f"[{NOBODY}]", "ADMIN").startswith(f"PermissionDeniedError uid {NOBODY}")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
@pytest.mark.parametrize(
    ("allowed", "groups", "admitted"),
    [
        ("[]", [4000], False),
        ("[4000]", [], False),
        ("[4000]", [4000], True),
        ("[4000, 4001]", [4001], True),
        ("[4000]", [*range(5000, 6000), 4000], True),
        ("[65534]", [], True),  # the primary group
        ('["daemon"]', [1], True),
        ('["daemon"]', [4000], False),
    ],
)
def test_members_of_allowed_groups(
    allowed: str, groups: list[int], admitted: bool, pack: Path, tmp_path: Path
) -> None:
    config = tmp_path / "config.toml"
    config.write_text(f'allowed_groups = {allowed}\nsocket_mode = "666"\n')
    with serving({"m": pack}, ram="1MiB", config=config) as daemon:
        daemon.socket.chmod(0o755)
        daemon.socket.parent.chmod(0o755)
        script = AS_NOBODY.replace("os.setgroups([])", f"os.setgroups({groups})")
        out, err = python(script, daemon.socket, "WORKER").communicate(timeout=20)
        assert err == ""
        if admitted:
            assert out == "attached\n"
            out, _ = python(script, daemon.socket, "ADMIN").communicate(timeout=20)
        assert out.startswith(f"PermissionDeniedError uid {NOBODY} may not ")
        assert admitted or allowed == "[]" or "join the group" in out


def test_health(roomy: Daemon) -> None:
    with grpc.insecure_channel(rpc_target(roomy.socket)) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        for service in ("", "expertstore.v1.ExpertStore"):
            answer = stub.Check(health_pb2.HealthCheckRequest(service=service), timeout=5)
            assert answer.status == health_pb2.HealthCheckResponse.SERVING


def test_reflection(roomy: Daemon) -> None:
    with grpc.insecure_channel(rpc_target(roomy.socket)) as channel:
        stub = reflection_pb2_grpc.ServerReflectionStub(channel)
        request = reflection_pb2.ServerReflectionRequest(list_services="")
        answers = list(stub.ServerReflectionInfo(iter([request]), timeout=5))
    names = {each.name for each in answers[0].list_services_response.service}
    assert names >= {"expertstore.v1.ExpertStore", "grpc.health.v1.Health"}


def test_watched_stats_come_at_the_asked_interval(roomy: Daemon) -> None:
    with Caller(roomy.socket) as caller:
        watching = caller.stub.WatchStats(pb.WatchStatsRequest(interval_seconds=0.1), timeout=20)
        uptimes = [next(watching).stats.uptime_seconds for _ in range(6)]
        pauses = [after - before for before, after in pairwise(uptimes)]
        assert min(pauses) > 0.09
        assert sum(pauses) < 2
        watching.cancel()
        for seconds in (0.01, -1, 4000, float("nan"), float("inf")):
            request = pb.WatchStatsRequest(interval_seconds=seconds)
            with pytest.raises(grpc.RpcError) as raised:
                next(caller.stub.WatchStats(request, timeout=5))
            assert raised.value.code() is grpc.StatusCode.INVALID_ARGUMENT


def test_load_of_a_relative_path(roomy: Daemon) -> None:
    """The daemon's working directory is not its caller's."""
    request = pb.LoadModelRequest(name="n", pack_path="pack")
    with (
        handshake(roomy.socket, Role.ADMIN, "", 5) as greeting,
        Caller(roomy.socket, greeting.credentials) as caller,
        pytest.raises(InvalidInputError, match="absolute"),
    ):
        caller.call("LoadModel", request)
