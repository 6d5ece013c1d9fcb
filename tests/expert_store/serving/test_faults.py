"""Workers that are killed or stopped while they hold what others want."""

import signal
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from expertd_testing.daemon import Daemon
from expertd_testing.handmade import record
from expertd_testing.raw_worker import Caller, RawWorker
from expertd_testing.watching import assert_serves, eventually, python
from expertstore.errors import DeadlineError, UnauthenticatedError
from expertstore.v1 import expert_store_pb2 as pb
from tests.expert_store.serving.conftest import RECORD_BYTES, STALL_SECONDS

# Fetches as many of layer 0 as it is told and holds them; the client's own behaviour.
HOLDING = """
import sys
from pathlib import Path
from expertd_client import Client, SessionLostError

with Client(Path(sys.argv[1])) as store, store.attach("m") as session:
    lease = session.acquire(0, range(int(sys.argv[2])))
    print("holds", session.id, flush=True)
    sys.stdin.readline()
    try:
        lease.release()
    except SessionLostError:
        print("lost", flush=True)
        session.reattach(5)
        with session.acquire(0, [0]):
            print("attached again", flush=True)
    else:
        print("released", flush=True)
"""


@contextmanager
def holding(daemon: Daemon, num_records: int = 6) -> "Iterator[tuple[subprocess.Popen[str], int]]":
    """Another process that holds records, and its session."""
    process = python(HOLDING, daemon.socket, num_records)
    with process:
        assert process.stdout is not None
        word, number = process.stdout.readline().split()
        assert word == "holds"
        try:
            yield process, int(number)
        finally:
            process.kill()


def attached(caller: Caller) -> set[int]:
    return {session.id for session in caller.stats().sessions}


def test_killed_worker_is_gone_at_once(tight: Daemon) -> None:
    with RawWorker(tight.socket) as other:
        before = other.stats().cut_offs
        for layer in (1, 2, 1):
            other.let_go()
            with holding(tight) as (process, number):
                assert number in attached(other)
                process.kill()
                eventually(lambda: number not in attached(other))
                # All six records are the next one's now.
                other.fetch(layer, range(6))
                assert other.read(layer, 5, RECORD_BYTES) == record(layer, 5)
        # Its connection's end freed them, and not the daemon's patience.
        assert other.stats().cut_offs == before


def test_worker_killed_while_it_waits(tight: Daemon) -> None:
    """Its place in the line is gone with it."""
    with RawWorker(tight.socket) as holder, RawWorker(tight.socket) as third:
        before = third.stats().cut_offs
        holder.fetch(1, range(6))
        waiting = python(HOLDING, tight.socket, 6)
        with waiting:
            eventually(lambda: len(attached(third)) == 3)
            eventually(lambda: holder.num_nudges > 0)
            waiting.kill()
            eventually(lambda: len(attached(third)) == 2)
            holder.let_go()
            third.fetch(2, range(6))
            assert third.stats().cut_offs == before


def test_stopped_worker_is_cut_off(tight: Daemon) -> None:
    with holding(tight) as (process, number), RawWorker(tight.socket) as other:
        process.send_signal(signal.SIGSTOP)
        began = time.monotonic()
        request = pb.FetchRequest(
            experts=[pb.ExpertRef(layer=1, expert=each) for each in range(6)], fetch_number=1
        )
        waiting = other.stub.Fetch.future(request, metadata=other.credentials, timeout=10)
        while number in attached(other):
            assert not waiting.done()
            time.sleep(0.005)
        assert waiting.result().num_missed == 6
        granted = time.monotonic() - began
        assert STALL_SECONDS <= granted < STALL_SECONDS + 0.7
        assert other.read(1, 0, RECORD_BYTES) == record(1, 0)
        other.let_go()
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate("\n", timeout=10)
        assert (out, err) == ("lost\nattached again\n", "")


def test_worker_that_is_slow_but_not_too_slow(tight: Daemon) -> None:
    with holding(tight) as (process, number), RawWorker(tight.socket) as other:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(DeadlineError):
            other.fetch(1, range(6), seconds=STALL_SECONDS / 3)
        assert number in attached(other)
        process.send_signal(signal.SIGCONT)
        out, err = process.communicate("\n", timeout=10)
        assert (out, err) == ("released\n", "")


def test_bytes_of_a_stuck_reader_stay_until_it_is_revoked(tight: Daemon) -> None:
    """It read a record without a fetch, so only its epoch protects it."""
    with (
        RawWorker(tight.socket) as loader,
        RawWorker(tight.socket, answering=False) as stuck,
        Caller(tight.socket) as caller,
    ):
        loader.fetch(0, range(6))
        stuck.hold()
        location = stuck.directory_view.word(stuck.entry(0, 3))
        start = ((location & 0xFFFF_FFFF) - 1) * 4096
        loader.let_go()
        request = pb.FetchRequest(
            experts=[pb.ExpertRef(layer=1, expert=each) for each in range(6)], fetch_number=2
        )
        waiting = loader.stub.Fetch.future(request, metadata=loader.credentials, timeout=10)
        lags = set()
        while not stuck.page.revoked:
            # The flag is read first and again after the bytes: that order is the protocol's.
            seen = stuck.arena[start : start + RECORD_BYTES]
            if not stuck.page.revoked:
                assert seen == record(0, 3)
                assert not waiting.done()
            lags |= {each.epoch_lag for each in caller.stats().sessions if each.id == stuck.id}
        assert max(lags) > 0  # what the daemon waits for is to be seen
        assert waiting.result().num_missed == 6
        assert stuck.arena[start : start + RECORD_BYTES] != record(0, 3)
        assert stuck.ended()
        with pytest.raises(UnauthenticatedError):
            stuck.fetch(0, [0])


def test_waiters_that_give_up_do_not_save_a_stuck_worker(tight: Daemon) -> None:
    """Callers may have less patience than the daemon: what they waited adds up."""
    with RawWorker(tight.socket) as stuck, RawWorker(tight.socket) as other:
        stuck.fetch(0, range(6))
        for _ in range(10):
            try:
                other.fetch(1, range(6), seconds=STALL_SECONDS / 2)
            except DeadlineError:
                other.let_go()
            else:
                break
        else:
            raise AssertionError("nobody was ever served")
        assert stuck.page.revoked
    assert_serves(tight.socket)


def test_holding_what_nobody_waits_for_is_no_fault(roomy: Daemon) -> None:
    with RawWorker(roomy.socket) as idle, RawWorker(roomy.socket) as other:
        idle.fetch(0, [0])
        for layer in (1, 2, 1, 2):
            other.fetch(layer, range(8))
            other.let_go()
            time.sleep(STALL_SECONDS / 2)
        assert not idle.page.revoked
