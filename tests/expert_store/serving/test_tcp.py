"""Calls from other hosts: who gets in, what they may do, what they cannot spoil."""

import re
import shutil
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertd_client import Client
from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import make_pack, record
from expertstore.v1 import expert_store_pb2 as pb
from expertstore.v1 import expert_store_pb2_grpc as rpc
from tests.certificates import Authority, Files, tcp_settings
from tests.expert_store.serving.scraping import ANY, scrape, values

CALL_SECONDS = 10.0
EXPERTS = [pb.ExpertRef(layer=layer, expert=expert) for layer in range(3) for expert in range(8)]


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Authority:
    return Authority(tmp_path_factory.mktemp("ca"))


@pytest.fixture(scope="module")
def server(authority: Authority) -> Files:
    return authority.issue("localhost", "127.0.0.1")


@pytest.fixture(scope="module")
def worker(authority: Authority) -> Files:
    return authority.issue("worker-1.lab")


@pytest.fixture(scope="module")
def secured(
    pack: Path, server: Files, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Daemon]:
    config = tmp_path_factory.mktemp("config") / "expertd.toml"
    config.write_text(
        "drain_seconds = 0.5\n" + tcp_settings(server, "worker-1.lab", "spiffe://lab/worker")
    )
    with serving({"m": pack}, config=config, arguments=ANY) as daemon:
        yield daemon


def address(daemon: Daemon) -> str:
    found = re.search(r" listening tcp=(\S+)", daemon.stderr)
    assert found, daemon.stderr
    return found[1]


@contextmanager
def channel(target: str, files: Files | None, ca: Path | None = None) -> Iterator[grpc.Channel]:
    options = [("grpc.enable_http_proxy", 0)]
    if files is None:
        made = grpc.insecure_channel(target, options)
    else:
        credentials = grpc.ssl_channel_credentials(
            (ca or files.ca).read_bytes(), files.key.read_bytes(), files.certificate.read_bytes()
        )
        made = grpc.secure_channel(target, credentials, options)
    with made:
        yield made


def list_models(target: str, files: Files | None, ca: Path | None = None) -> list[str]:
    with channel(target, files, ca) as made:
        response = rpc.ExpertStoreStub(made).ListModels(
            pb.ListModelsRequest(), timeout=CALL_SECONDS
        )
        return [model.name for model in response.models]


def refused(target: str, files: Files | None, ca: Path | None = None) -> grpc.StatusCode:
    with pytest.raises(grpc.RpcError) as caught:
        list_models(target, files, ca)
    code: grpc.StatusCode = caught.value.code()
    return code


def test_what_a_client_on_another_host_may_do(secured: Daemon, worker: Files) -> None:
    with channel(address(secured), worker) as made:
        store, health = rpc.ExpertStoreStub(made), health_pb2_grpc.HealthStub(made)
        assert health.Check(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS).status == 1
        watched = health.Watch(health_pb2.HealthCheckRequest(), timeout=CALL_SECONDS)
        assert next(watched).status == 1
        watched.cancel()
        assert store.ListModels(pb.ListModelsRequest(), timeout=CALL_SECONDS).models
        model = store.GetModel(pb.GetModelRequest(name="m"), timeout=CALL_SECONDS)
        assert model.summary.num_experts == 24
        assert store.GetStats(pb.GetStatsRequest(), timeout=CALL_SECONDS).stats.models
        read = store.Read(pb.ReadRequest(model="m", experts=EXPERTS), timeout=CALL_SECONDS)
        for ref, chunk in zip(EXPERTS, read, strict=True):
            assert chunk.data == record(ref.layer, ref.expert)


@pytest.mark.parametrize(
    ("method", "request_"),
    [
        ("Fetch", pb.FetchRequest(experts=EXPERTS[:1], fetch_number=1)),
        ("Prefetch", pb.PrefetchRequest(experts=EXPERTS[:1])),
        ("Pin", pb.PinRequest(experts=EXPERTS[:1])),
        ("Unpin", pb.UnpinRequest()),
        ("LoadModel", pb.LoadModelRequest(name="x", pack_path="/etc")),
        ("UnloadModel", pb.UnloadModelRequest(name="m")),
    ],
)
def test_what_it_may_not(secured: Daemon, worker: Files, method: str, request_: object) -> None:
    with (
        channel(address(secured), worker) as made,
        pytest.raises(grpc.RpcError) as caught,
    ):
        getattr(rpc.ExpertStoreStub(made), method)(
            request_,
            timeout=CALL_SECONDS,
            # Not even with a token, which is a local session's.
            metadata=(("expertd-token", "0" * 32),),
        )
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert "Unix socket" in caught.value.details()


def test_a_local_sessions_token_is_of_no_use_elsewhere(secured: Daemon, worker: Files) -> None:
    with Client(secured.socket) as store, store.attach("m") as session:
        credentials = session._attachment.credentials
        with (
            channel(address(secured), worker) as made,
            pytest.raises(grpc.RpcError) as caught,
        ):
            rpc.ExpertStoreStub(made).Pin(
                pb.PinRequest(experts=EXPERTS[:1]), timeout=CALL_SECONDS, metadata=credentials
            )
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_who_is_not_on_the_list(secured: Daemon, authority: Authority) -> None:
    stranger = authority.issue("worker-2.lab")
    before = values(scrape(secured))["expertd_refusals_total", "PERMISSION_DENIED", "tcp"]
    with channel(address(secured), stranger) as made:
        health = health_pb2_grpc.HealthStub(made)
        calls = [
            lambda: rpc.ExpertStoreStub(made).ListModels(pb.ListModelsRequest(), timeout=5),
            lambda: next(rpc.ExpertStoreStub(made).Read(pb.ReadRequest(model="m"), timeout=5)),
            lambda: health.Check(health_pb2.HealthCheckRequest(), timeout=5),
            lambda: next(health.Watch(health_pb2.HealthCheckRequest(), timeout=5)),
        ]
        for call in calls:
            with pytest.raises(grpc.RpcError, match=r"worker-2\.lab is not on") as caught:
                call()
            assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED
    assert secured.stderr.count("peer refused names=worker-2.lab") == 1
    now = values(scrape(secured))["expertd_refusals_total", "PERMISSION_DENIED", "tcp"]
    assert now == before + 4


def test_certificates_that_prove_nothing(
    secured: Daemon, authority: Authority, worker: Files, tmp_path: Path
) -> None:
    target = address(secured)
    stranger = Authority(tmp_path / "other").issue("worker-1.lab")
    assert refused(target, stranger, ca=authority.path) is grpc.StatusCode.UNAVAILABLE
    assert refused(target, authority.expired("worker-1.lab")) is grpc.StatusCode.UNAVAILABLE
    assert refused(target, None) is grpc.StatusCode.UNAVAILABLE
    with (
        grpc.secure_channel(target, grpc.ssl_channel_credentials(worker.ca.read_bytes())) as made,
        pytest.raises(grpc.RpcError) as caught,
    ):
        rpc.ExpertStoreStub(made).ListModels(pb.ListModelsRequest(), timeout=CALL_SECONDS)
    assert caught.value.code() is grpc.StatusCode.UNAVAILABLE
    assert list_models(target, worker) == ["m"]
    assert "andshake" not in secured.stderr, "anybody could fill the log"


def test_names_are_also_uris(secured: Daemon, authority: Authority) -> None:
    assert list_models(address(secured), authority.with_uri("spiffe://lab/worker")) == ["m"]
    assert (
        refused(address(secured), authority.with_uri("spiffe://lab/other"))
        is grpc.StatusCode.PERMISSION_DENIED
    )


def test_new_certificates_come_into_force_by_themselves(
    pack: Path, authority: Authority, worker: Files, tmp_path: Path
) -> None:
    used = tmp_path / "used"
    used.mkdir()
    old = Authority(tmp_path / "old").issue("127.0.0.1")
    for source, name in ((old.certificate, "c"), (old.key, "k"), (authority.path, "ca")):
        shutil.copy(source, used / name)
    config = tmp_path / "expertd.toml"
    config.write_text(tcp_settings(Files(used / "ca", used / "c", used / "k"), "worker-1.lab"))
    with serving({"m": pack}, config=config) as daemon:
        target = address(daemon)
        assert refused(target, worker) is grpc.StatusCode.UNAVAILABLE
        assert list_models(target, worker, ca=old.ca) == ["m"]
        new = authority.issue("127.0.0.1")
        shutil.copy(new.certificate, used / "c")
        assert list_models(target, worker, ca=old.ca) == ["m"], "half renewed: the old ones stay"
        shutil.copy(new.key, used / "k")
        assert list_models(target, worker) == ["m"]
        assert "certificates not renewed" in daemon.stderr
        assert "certificates renewed" in daemon.stderr


def test_plaintext_where_it_is_asked_for(pack: Path, tmp_path: Path) -> None:
    config = tmp_path / "expertd.toml"
    config.write_text('[tcp]\nlisten = "127.0.0.1:0"\nplaintext = true\n')
    with serving({"m": pack}, config=config) as daemon:
        assert list_models(address(daemon), None) == ["m"]
        with (
            channel(address(daemon), None) as made,
            pytest.raises(grpc.RpcError) as caught,
        ):
            rpc.ExpertStoreStub(made).UnloadModel(pb.UnloadModelRequest(name="m"), timeout=5)
        assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_what_cannot_be_listened_on_is_one_sentence(server: Files, tmp_path: Path) -> None:
    config = tmp_path / "expertd.toml"
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        where = f"127.0.0.1:{taken.getsockname()[1]}"
        for listen, cause in ((where, "Address already in use"), ("192.0.2.1:1", "Cannot assign")):
            config.write_text(tcp_settings(server, "w", listen=listen))
            assert f"tcp.listen {listen} cannot be used: {cause}" in failure(config)
    config.write_text(tcp_settings(Files(server.ca, server.certificate, tmp_path / "k"), "w"))
    assert f"{tmp_path / 'k'} cannot be read: No such file" in failure(config)


def failure(config: Path) -> str:
    """The one line that ``expertd serve`` ends with."""
    with pytest.raises(RuntimeError) as caught, serving(config=config):
        pass
    lines = [line for line in str(caught.value).splitlines() if line.startswith("expertd: ")]
    assert "Traceback" not in str(caught.value)
    return lines[-1]


def test_readers_that_stop_reading_cost_bounded_memory_and_hold_up_nobody(
    authority: Authority, server: Files, worker: Files, tmp_path: Path
) -> None:
    pack = make_pack(tmp_path / "pack", record_bytes=4 << 20)
    config = tmp_path / "expertd.toml"
    config.write_text(
        'stall_seconds = 2.0\nread_buffer = "48MiB"\n'
        + tcp_settings(server, "worker-1.lab", "worker-2.lab")
    )
    request = pb.ReadRequest(model="m", experts=EXPERTS)
    other = authority.issue("worker-2.lab")
    with (
        serving({"m": pack}, ram=256 << 20, config=config) as daemon,
        channel(address(daemon), worker) as made,
        channel(address(daemon), other) as others,
        Client(daemon.socket) as local,
        local.attach("m") as session,
    ):
        store = rpc.ExpertStoreStub(made)
        assert sum(len(chunk.data) for chunk in store.Read(request, timeout=60)) == 96 << 20
        before = anonymous_bytes(daemon.pid)
        stalled = [store.Read(request, timeout=60) for _ in range(4)]
        for stream in stalled:
            next(stream)
        with pytest.raises(grpc.RpcError, match="4 reads under way") as caught:
            next(store.Read(request, timeout=10))
        assert caught.value.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
        read = rpc.ExpertStoreStub(others).Read(request, timeout=60)
        assert sum(len(chunk.data) for chunk in read) == 96 << 20
        for lease in session.waves(0, range(8)):
            lease.release()
        # The buffer, the loader threads' own, a chunk or two for each stream, and what glibc keeps
        # of what was freed. Without a limit it would be five times 96 MiB.
        assert anonymous_bytes(daemon.pid) - before < 160 << 20
        time.sleep(3)  # past stall_seconds: nothing that a client may see says so
        for stream in stalled:
            with pytest.raises(grpc.RpcError, match="took nothing for 2 s"):
                list(stream)
        deadline = time.monotonic() + 20
        while True:  # The daemon learns a moment later that we know.
            try:
                assert len(next(store.Read(request, timeout=10)).data) == 1 << 20
                break
            except grpc.RpcError:
                assert time.monotonic() < deadline
                time.sleep(0.05)


def anonymous_bytes(pid: int) -> int:
    """What a process has for itself."""
    text = Path(f"/proc/{pid}/status").read_text()
    found = re.search(r"RssAnon:\s+(\d+) kB", text)
    assert found
    return int(found[1]) << 10
