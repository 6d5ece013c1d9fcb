"""``expertd record``: a trace of what workers of a real daemon use."""

import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import pytest

from expertd.hosting.touch_watch import MAX_WATCHERS
from expertd.residency import make_policy
from expertd.traces.replay import read_trace, replay
from expertd_client import Client
from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import make_pack
from expertd_testing.raw_worker import RawWorker
from expertd_testing.watching import eventually, expertd
from expertstore.errors import PreconditionError
from expertstore.shared.session_page import RING_ENTRIES
from expertstore.trace import Phase, Row, TraceReader
from expertstore.v1 import expert_store_pb2 as pb
from tests.expert_store.serving.conftest import RECORD_BYTES

ARRIVAL_SECONDS = 0.5
"""From the daemon to the file: milliseconds."""

Recording = subprocess.Popen[str]


@contextmanager
def recording(daemon: Daemon, output: Path, *arguments: str) -> Iterator[Recording]:
    command = [sys.executable, "-m", "expertd", "record", "--socket", str(daemon.socket)]
    command += ["--model", "m", "--output", str(output), *arguments]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        assert process.stderr.readline().startswith("recording m ")
        yield process
    finally:
        process.kill()
        process.communicate()


def finish(process: Recording, number: int = signal.SIGINT) -> str:
    """What it says at its end."""
    process.send_signal(number)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 0, said
    return said


def rows_of(path: Path) -> list[Row]:
    with TraceReader(path) as reader:
        return list(reader)


def drained(daemon: Daemon, num_accesses: int) -> bool:
    """Whether the daemon has read so many accesses off the rings, and so has sent them on."""
    with Client(daemon.socket) as client:
        (model,) = client.stats()["models"]
    return bool(model["host_hits"] + model["nvme_misses"] >= num_accesses)


def test_what_workers_use_is_written(pack: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.csv"
    with (
        serving({"m": pack}, ram=64 * RECORD_BYTES) as daemon,
        recording(daemon, output) as process,
    ):
        with Client(daemon.socket) as store, store.attach("m") as session:
            session.acquire(0, [1, 2, 5, 7]).release()
            session.acquire(1, [3]).release()
            for _ in range(2):
                session.acquire(0, [1, 2]).release()
                session.acquire(2, [4, 0]).release()
            number = session.id
        eventually(lambda: drained(daemon, 13))
        time.sleep(ARRIVAL_SECONDS)
        assert not output.exists(), "half a trace"
        said = finish(process)
    assert f"wrote 13 accesses in 6 rows to {output}" in said
    assert rows_of(output) == [
        Row(Phase.PREFILL, 0, 0, (1, 2, 5, 7), number),
        Row(Phase.PREFILL, 0, 1, (3,), number),
        Row(Phase.DECODE, 1, 0, (1, 2), number),
        Row(Phase.DECODE, 1, 2, (4, 0), number),
        Row(Phase.DECODE, 2, 0, (1, 2), number),
        Row(Phase.DECODE, 2, 2, (4, 0), number),
    ]
    assert stat.S_IMODE(output.stat().st_mode) == 0o600


def test_the_recorded_trace_replays_to_what_the_daemon_counted(tmp_path: Path) -> None:
    """One worker, one model: the replay is the run again, but for what time has to do with."""
    pack = make_pack(tmp_path / "pack", layers=6, experts=12)
    output, num_slots = tmp_path / "t.csv", 24
    with (
        serving({"m": pack}, ram=num_slots * RECORD_BYTES) as daemon,
        recording(daemon, output) as process,
    ):
        with Client(daemon.socket) as store, store.attach("m") as session:
            for step in range(60):
                for layer in range(6):
                    experts = sorted({(layer + step // 7) % 12, (step * step + layer) % 12})
                    session.acquire(layer, experts).release()
            counted = (session.host_hits, session.nvme_misses)
        eventually(lambda: drained(daemon, sum(counted)))
        time.sleep(ARRIVAL_SECONDS)
        finish(process, signal.SIGTERM)
    trace = read_trace(output)
    assert len(trace.entries) == sum(counted)
    policy = make_policy("density", trace.model.num_experts, trace.model.experts_per_token)
    rate = replay(trace, policy, num_slots).lifetime
    assert 0.2 < rate < 0.9
    assert rate == pytest.approx(counted[0] / sum(counted), abs=0.02)


def test_it_ends_after_its_seconds_and_with_the_model(pack: Path, tmp_path: Path) -> None:
    with serving({"m": pack}, ram=64 * RECORD_BYTES) as daemon:
        done = expertd(
            "record", "--socket", daemon.socket, "--model", "m", "--output", tmp_path / "a.csv",
            "--seconds", "0.3",
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert rows_of(tmp_path / "a.csv") == []
        with recording(daemon, tmp_path / "b.csv") as process:
            with Client(daemon.socket) as client:
                client.unload_model("m")
            _, said = process.communicate(timeout=20)
            assert process.returncode == 0, said
        assert (tmp_path / "b.csv").exists()


def test_the_daemons_end_leaves_the_trace_until_then(pack: Path, tmp_path: Path) -> None:
    output = tmp_path / "t.csv"
    with (
        serving({"m": pack}, ram=64 * RECORD_BYTES) as daemon,
        recording(daemon, output) as process,
    ):
        with Client(daemon.socket) as store, store.attach("m") as session:
            session.acquire(0, [1, 2]).release()
        eventually(lambda: drained(daemon, 2))
        time.sleep(ARRIVAL_SECONDS)
        daemon.kill()
        _, said = process.communicate(timeout=20)
    assert process.returncode == 2
    assert "wrote 2 accesses in 1 rows" in said
    assert "No expertd answers" in said
    assert [row.experts for row in rows_of(output)] == [(1, 2)]


def test_an_overrun_ring_is_a_gap(tight: Daemon, tmp_path: Path) -> None:
    output = tmp_path / "t.csv"
    with recording(tight, output) as process:
        # Stopped, the daemon cannot read the ring until it has been overrun.
        with RawWorker(tight.socket) as worker:
            os.kill(tight.pid, signal.SIGSTOP)
            try:
                for _ in range(RING_ENTRIES // 2 + 50):
                    worker.touch(0, [1, 2])
            finally:
                os.kill(tight.pid, signal.SIGCONT)
            eventually(lambda: drained(tight, RING_ENTRIES + 100))
        time.sleep(ARRIVAL_SECONDS)
        said = finish(process)
    assert "accesses are missing" in said
    with TraceReader(output) as reader:
        num_read = sum(len(row.experts) for row in reader)
        assert reader.num_lost >= 100
        assert num_read + reader.num_lost == RING_ENTRIES + 100


def test_only_an_administrator_watches(tight: Daemon) -> None:
    with RawWorker(tight.socket) as worker:
        stream = worker.stub.WatchTouches(
            pb.WatchTouchesRequest(model="m"), metadata=worker.credentials, timeout=10
        )
        stream.initial_metadata()
        worker.touch(0, [1, 2])  # nothing of which it may get to see
        with pytest.raises(grpc.RpcError) as caught:
            next(iter(stream))
    assert caught.value.code() is grpc.StatusCode.PERMISSION_DENIED


def test_watchers_are_counted(tight: Daemon) -> None:
    with Client(tight.socket) as client:
        streams = []
        contexts = [client.watch_touches("m", timeout_seconds=20) for _ in range(MAX_WATCHERS + 1)]
        try:
            streams = [context.__enter__() for context in contexts]
            with pytest.raises(PreconditionError, match="end one"):
                next(iter(streams[-1]))
        finally:
            for context in contexts[: len(streams)]:
                context.__exit__(None, None, None)


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--model", "x", "--output", "t.csv"], "no model named 'x'"),
        (["--model", "m", "--output", "/no/t.csv"], "/no/t.csv cannot be written"),
        (["--model", "m", "--output", "t.csv", "--seconds", "0"], "--seconds is 0"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(
    tight: Daemon, tmp_path: Path, arguments: list[str], problem: str
) -> None:
    done = expertd("record", "--socket", tight.socket, *(
        str(tmp_path / a) if a == "t.csv" else a for a in arguments
    ))  # fmt: skip
    assert done.returncode == 2
    assert problem in done.stderr
    assert done.stderr.count("\n") == 1
    assert not list(tmp_path.iterdir())
