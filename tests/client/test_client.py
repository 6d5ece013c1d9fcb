"""The client's calls without a session, against a real daemon."""

import json
import signal
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from xxhash import xxh3_64_hexdigest, xxh3_64_intdigest

from expertd_client import (
    Client,
    DeadlineError,
    InvalidInputError,
    ModelState,
    NotFoundError,
    PackError,
    PreconditionError,
    RecordLostError,
    UnavailableError,
)
from expertd_client.record import Record, RecordAssembler
from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import make_pack, record
from expertstore.pack.manifest import read_manifest
from expertstore.v1 import expert_store_pb2 as pb
from tests.client.conftest import RECORD_BYTES
from tests.client.observing import eventually


def test_list_models(store: Client, pack: Path) -> None:
    (model,) = store.list_models()
    assert (model.name, model.architecture, model.scheme) == ("m", "HandmadeForCausalLM", "bf16")
    assert (model.num_experts, model.record_bytes) == (24, RECORD_BYTES)
    assert model.expert_bytes == 24 * RECORD_BYTES
    assert model.pack_path == pack
    assert model.state is ModelState.SERVING


def test_get_model_says_what_the_manifest_says(store: Client, pack: Path) -> None:
    manifest, fingerprint = (read_manifest(pack).manifest, read_manifest(pack).fingerprint)
    model = store.get_model("m")
    assert model.fingerprint == fingerprint
    assert model.layouts == manifest.layouts
    assert list(model.layers) == [layer.layer for layer in manifest.layers]
    for layer, (index, info) in zip(manifest.layers, enumerate(model.layers.values()), strict=True):
        assert info.layout == manifest.layouts[layer.layout]
        assert info.num_experts == layer.num_experts
        assert info.experts_per_token == layer.experts_per_token
        assert info.first_entry == index * 8
    assert model.num_experts == manifest.num_experts
    assert model.record_bytes == manifest.max_record_bytes
    assert model.expert_bytes == manifest.expert_bytes
    assert model.max_fetch_records == 64


def test_no_such_model(store: Client) -> None:
    for call in (store.get_model, store.attach):
        with pytest.raises(NotFoundError, match=r"'other'.*loaded are: m"):
            call("other")
    with pytest.raises(NotFoundError):
        next(store.read("other", [(0, 0)]))


def test_stats_keep_the_contract(store: Client) -> None:
    with store.attach("m") as session:
        session.acquire(0, [0]).release()
        stats = store.stats()
    names = {"incarnation", "uptime_seconds", "arena", "models", "sessions", "warnings"}
    names |= {"policy", "peers"}
    assert set(stats) >= names
    arena, (model,), (told,) = stats["arena"], stats["models"], stats["sessions"]
    assert set(arena) >= {"bytes_total", "bytes_used", "locked", "huge_pages"}
    assert set(model) >= {
        "name",
        "num_experts",
        "num_resident",
        "record_bytes",
        "host_hits",
        "nvme_misses",
        "nvme_bytes_read",
        "evictions",
        "records_lost",
        "adopted_records",
        "adopted_bytes",
        "dropped_records",
        "prefetch",
    }
    assert set(model["prefetch"]) == {"issued", "useful", "late", "wasted"}
    assert set(told) >= {
        "id",
        "role",
        "pid",
        "uid",
        "model",
        "attached_seconds",
        "epoch_lag",
        "bytes_read",
    }
    assert type(model["nvme_bytes_read"]) is int
    assert (told["id"], told["model"]) == (session.id, "m")
    assert json.loads(json.dumps(stats)) == stats


def test_watch_stats(store: Client) -> None:
    watched = store.watch_stats(0.05)
    uptimes = [next(watched)["uptime_seconds"] for _ in range(3)]
    watched.close()
    assert uptimes == sorted(set(uptimes))
    with pytest.raises(InvalidInputError, match="interval"):
        next(store.watch_stats(0.001))


def test_read(store: Client, pack: Path) -> None:
    manifest = read_manifest(pack).manifest
    wanted = [(0, 0), (2, 7), (0, 0)]
    for (layer, expert), got in zip(wanted, store.read("m", wanted), strict=True):
        checksum = manifest.layers[layer].checksums[expert]
        assert got == Record(layer, expert, record(layer, expert), checksum)
    assert store.stats()["sessions"] == []


def test_read_of_records_larger_than_a_chunk(tmp_path: Path) -> None:
    size = 3 << 20
    pack = make_pack(tmp_path / "pack", layers=1, experts=2, record_bytes=size)
    with serving({"m": pack}, ram=8 << 20) as daemon, Client(daemon.socket) as store:
        (got,) = store.read("m", [(0, 1)])
        assert got.data == record(0, 1, size)


def test_read_given_up_halfway_ends_its_session(store: Client) -> None:
    records = store.read("m", [(0, expert) for expert in range(8)])
    next(records)
    records.close()
    eventually(lambda: store.stats()["sessions"] == [])


def test_read_of_a_damaged_pack(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack")
    file = pack / "experts-00000.safetensors"
    with file.open("r+b") as stream:
        stream.truncate(4096 + RECORD_BYTES + 5)
    with serving({"m": pack}, ram=64 * RECORD_BYTES) as daemon, Client(daemon.socket) as store:
        records = store.read("m", [(0, 0), (0, 1)])
        assert next(records).data == record(0, 0)
        with pytest.raises(RecordLostError, match="truncated") as raised:
            next(records)
        assert raised.value.experts == ((0, 1),)


def test_load_and_unload(tmp_path: Path, roomy: Daemon) -> None:
    pack = make_pack(tmp_path / "pack", seed=1)
    with Client(roomy.socket) as store:
        assert store.load_model("n", pack).name == "n"
        assert [model.name for model in store.list_models()] == ["m", "n"]
        with pytest.raises(PreconditionError, match="already"):
            store.load_model("n", pack)
        with pytest.raises(PackError, match="not a pack"):
            store.load_model("o", tmp_path)
        with store.attach("n") as session, session.acquire(0, [1]) as lease:
            assert bytes(lease.views[0]) == record(0, 1, seed=1)
        assert store.unload_model("n") == RECORD_BYTES
        with pytest.raises(NotFoundError):
            store.unload_model("n")
        assert store.stats()["sessions"] == []


def test_nobody_there(tmp_path: Path) -> None:
    with Client(tmp_path) as store:
        for call in (store.list_models, store.stats, lambda: next(store.watch_stats())):
            with pytest.raises(UnavailableError) as raised:
                call()
            assert str(raised.value).startswith(
                f"No expertd answers at {tmp_path} (no socket in it)"
            )
        with pytest.raises(UnavailableError, match="expertd serve --socket"):
            store.attach("m")


def test_stopped_daemon_is_a_deadline(roomy: Daemon) -> None:
    with Client(roomy.socket, timeout_seconds=0.2) as store:
        store.list_models()
        roomy.signal(signal.SIGSTOP)
        try:
            with pytest.raises(DeadlineError, match="did not answer"):
                store.list_models()
            with pytest.raises(DeadlineError, match="did not answer"):
                store.attach("m")
        finally:
            roomy.signal(signal.SIGCONT)
        store.list_models()


def test_a_directory_with_an_odd_name(pack: Path, tmp_path: Path) -> None:
    socket = tmp_path / "a b#?ü"
    with serving({"m": pack}, ram=64 * RECORD_BYTES, socket=socket), Client(socket) as store:
        assert store.attach("m").connected


chunks = st.lists(st.integers(1, 50), min_size=1, max_size=5)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3), chunks), max_size=5))
def test_assembler(records: list[tuple[int, int, list[int]]]) -> None:
    assembler = RecordAssembler([(layer, expert) for layer, expert, _ in records])
    for number, (layer, expert, sizes) in enumerate(records):
        data = bytes((number + i) % 256 for i in range(sum(sizes)))
        offset, got = 0, None
        for size in sizes:
            assert got is None
            got = assembler.feed(chunk(layer, expert, data, offset, size))
            offset += size
        assert got == Record(layer, expert, data, xxh3_64_hexdigest(data))
    assembler.finish()


def chunk(layer: int, expert: int, data: bytes, offset: int, size: int) -> pb.ReadResponse:
    return pb.ReadResponse(
        expert=pb.ExpertRef(layer=layer, expert=expert),
        offset=offset,
        data=data[offset : offset + size],
        record_bytes=len(data),
        checksum=xxh3_64_intdigest(data),
    )


def test_assembler_refuses_what_does_not_add_up() -> None:
    data = bytes(range(100))
    gap = chunk(0, 0, data, 50, 50)
    flipped = chunk(0, 0, data, 0, 100)
    flipped.data = bytes(100)
    too_long = chunk(0, 0, data, 0, 100)
    too_long.record_bytes = 99
    for wrong in (gap, flipped, too_long, chunk(0, 1, data, 0, 100)):
        with pytest.raises(RecordLostError):
            RecordAssembler([(0, 0)]).feed(wrong)
    with pytest.raises(RecordLostError, match="out of turn"):
        RecordAssembler([]).feed(chunk(0, 0, data, 0, 100))
    half = RecordAssembler([(0, 0)])
    assert half.feed(chunk(0, 0, data, 0, 50)) is None
    with pytest.raises(RecordLostError, match="in full"):
        half.finish()
