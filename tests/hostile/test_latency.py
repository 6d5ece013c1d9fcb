"""Whatever an allowed process does to the daemon, an honest worker's fetches go on.

``python -m bench.hostile`` has the figures: a fetch takes a millisecond, 2 to 40 while
the daemon is attacked. Here it may take many times that, and is compared with what it took just
before.
"""

import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from expertd_client import CapacityError, Client
from expertd_testing.attacks import ATTACKS, MAX_SESSIONS
from expertd_testing.daemon import Daemon, serving
from expertd_testing.handmade import make_pack
from expertd_testing.honest import RECORD_BYTES, measure, quantile
from expertd_testing.patience import HANG_SECONDS
from expertd_testing.raw_worker import Caller, RawWorker
from expertd_testing.watching import assert_serves, eventually, num_files

MOST_SLOWDOWN = 400
GROWTH_BYTES = 64 << 20
REFUSED = {
    "million_ids": "RESOURCE_EXHAUSTED",
    "eight_megabytes": "RESOURCE_EXHAUSTED",
    "longest_list": "INVALID_ARGUMENT",
    "thousand_sessions": CapacityError.__name__,
}


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_pack(tmp_path_factory.mktemp("packs") / "pack")


@pytest.fixture
def daemon(pack: Path) -> Iterator[Daemon]:
    """With room for half of the model, and the default patience, which is long."""
    with serving({"m": pack}, ram=12 * RECORD_BYTES) as daemon:
        yield daemon


@pytest.mark.parametrize("name", ATTACKS)
def test_others_go_on(name: str, daemon: Daemon) -> None:
    files = num_files(daemon.pid)
    result = measure(name, daemon, 0.3, 1.5)
    assert quantile(result.during, 0.5) < MOST_SLOWDOWN * quantile(result.before, 0.5)
    assert result.during[-1] < HANG_SECONDS
    assert result.growth_bytes < GROWTH_BYTES
    if name in REFUSED:
        assert result.said.get(REFUSED[name], 0) > 0
        assert "OK" not in result.said
        assert result.said.get("attached", 0) <= MAX_SESSIONS
    with Caller(daemon.socket) as caller:
        eventually(lambda: not caller.stats().sessions)
        eventually(lambda: num_files(daemon.pid) <= files + 2)
    assert_serves(daemon.socket)
    assert "unexpected failure" not in daemon.stderr
    assert "Traceback" not in daemon.stderr


def test_who_has_only_attached_is_not_waited_for(daemon: Daemon, pack: Path) -> None:
    """But a client's session is, from before its first look-up, also if it never fetches."""
    with RawWorker(daemon.socket) as other, Client(daemon.socket) as store:
        other.fetch(0, range(8))
        other.let_go()
        with store.attach("m") as session:
            lease = session.acquire(0, range(8))  # hits: no call since it attached
            assert (session.host_hits, session.nvme_misses) == (8, 0)
            other.fetch(1, range(4))
            other.let_go()
            before = [bytes(view) for view in lease.views]
            waiting = other.stub.Fetch.future(
                other.fetch_request(2, range(8)), metadata=other.credentials, timeout=20
            )
            eventually(lambda: any(each.epoch_lag for each in other.stats().sessions))
            time.sleep(0.3)  # room would long have been found, were it not waited for
            assert not waiting.done()
            assert [bytes(view) for view in lease.views] == before
            lease.release()
            assert waiting.result().num_missed == 8
