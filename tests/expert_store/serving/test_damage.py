"""Records that are damaged or cut off on disk: only they are lost, and only while they are."""

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest

from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import PAGE, make_pack, record
from expertd_testing.raw_worker import RawWorker
from expertd_testing.watching import eventually
from expertstore.errors import RecordLostError
from expertstore.v1 import expert_store_pb2 as pb
from tests.expert_store.serving.conftest import RECORD_BYTES

FILE = "experts-00000.safetensors"


@pytest.fixture(params=["direct", "mmap"])
def damaged(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[tuple[Daemon, Path]]:
    path = make_pack(tmp_path / "pack")
    arguments = ["--disk-io", request.param]
    with serving({"m": path}, ram=64 * RECORD_BYTES, arguments=arguments) as daemon:
        yield daemon, path / FILE


def offset(layer: int, expert: int) -> int:
    return PAGE + (8 * layer + expert) * RECORD_BYTES


def flip(file: Path, position: int) -> None:
    with file.open("r+b") as stream:
        stream.seek(position)
        byte = stream.read(1)[0]
        stream.seek(position)
        stream.write(bytes([byte ^ 0x10]))


def lost(worker: RawWorker, layer: int, experts: list[int]) -> tuple[int, RecordLostError]:
    """Fetches in vain; the count of records lost so far, and what was said."""
    with pytest.raises(RecordLostError) as raised:
        worker.fetch(layer, experts)
    worker.let_go()
    return worker.stats().models[0].records_lost, raised.value


def test_one_flipped_bit(damaged: tuple[Daemon, Path]) -> None:
    daemon, file = damaged
    with RawWorker(daemon.socket) as worker:
        flip(file, offset(1, 5) + RECORD_BYTES - 1)
        count, error = lost(worker, 1, [4, 5, 6])
        assert count == 1
        assert error.experts == ((1, 5),)
        assert str(error).startswith("the record of layer 1 expert 5 of m is lost: its checksum")
        assert str(file) in str(error)
        assert worker.read(1, 5, RECORD_BYTES) is None
        # Those beside it in that fetch, and those beside it in the file.
        worker.fetch(1, [4, 6])
        assert worker.read(1, 4, RECORD_BYTES) == record(1, 4)
        assert worker.read(1, 6, RECORD_BYTES) == record(1, 6)
        worker.let_go()
        # A hint at it publishes nothing either, and a read says the same.
        worker.prefetch(1, [5])
        eventually(lambda: worker.stats().models[0].records_lost == 2)
        request = pb.ReadRequest(experts=[pb.ExpertRef(layer=1, expert=5)])
        with pytest.raises(grpc.RpcError) as raised:
            list(worker.stub.Read(request, metadata=worker.credentials))
        assert raised.value.code() is grpc.StatusCode.DATA_LOSS
        count, _ = lost(worker, 1, [5])
        assert count == 4
        used = worker.stats().arena.bytes_used
        assert used == worker.stats().models[0].num_resident * RECORD_BYTES == 2 * RECORD_BYTES
        flip(file, offset(1, 5) + RECORD_BYTES - 1)
        worker.fetch(1, [5])
        assert worker.read(1, 5, RECORD_BYTES) == record(1, 5)


@pytest.mark.parametrize("cut", [0, 100, PAGE, RECORD_BYTES - 1])
def test_truncated_in_a_record(damaged: tuple[Daemon, Path], cut: int) -> None:
    daemon, file = damaged
    whole = file.read_bytes()
    with RawWorker(daemon.socket) as worker:
        with file.open("r+b") as stream:
            stream.truncate(offset(2, 6) + cut)
        _, error = lost(worker, 2, [5, 6, 7])
        assert error.experts == ((2, 6), (2, 7))
        assert "layer 2 expert 6 and 1 more of m is lost" in str(error)
        assert "is truncated" in str(error)
        assert worker.read(2, 6, RECORD_BYTES) is None
        worker.fetch(2, [4, 5])
        assert worker.read(2, 5, RECORD_BYTES) == record(2, 5)
        worker.let_go()
        with file.open("r+b") as stream:
            stream.write(whole)
        worker.fetch(2, [6, 7])
        assert worker.read(2, 6, RECORD_BYTES) == record(2, 6)


def test_record_that_became_longer_or_moved(damaged: tuple[Daemon, Path]) -> None:
    """Another file under the same name: the daemon goes on reading the one it opened."""
    daemon, file = damaged
    with RawWorker(daemon.socket) as worker:
        file.rename(file.with_suffix(".away"))
        file.write_bytes(b"")
        worker.fetch(0, range(8))
        assert worker.read(0, 7, RECORD_BYTES) == record(0, 7)
