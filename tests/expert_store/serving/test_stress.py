"""Several worker processes contend for a small arena; each checks every byte that it reads."""

import random
import subprocess
import time
from pathlib import Path

import pytest

from expertd_testing.daemon import serving
from expertd_testing.raw_worker import Caller
from expertd_testing.watching import assert_serves, eventually, python
from tests.expert_store.serving.conftest import RECORD_BYTES

SECONDS = 3.5
NUM_WORKERS = 4

WORKER = """
import random, sys, time
from pathlib import Path
from expertd_client import Client, SessionLostError
from expertd_testing.handmade import record

records = {(l, e): record(l, e) for l in range(3) for e in range(8)}
chance = random.Random(sys.argv[3])
end = time.monotonic() + float(sys.argv[2])
checked = 0
with Client(Path(sys.argv[1]), timeout_seconds=20) as store, store.attach("m") as session:
    print("attached", flush=True)
    while time.monotonic() < end:
        for layer in range(3):
            wanted = chance.sample(range(8), chance.choice((1, 2, 2, 2, 8)))
            if chance.random() < 0.3:
                session.prefetch([((layer + 1) % 3, expert) for expert in wanted])
            for lease in session.waves(layer, wanted):
                with lease:
                    if chance.random() < 0.2:
                        time.sleep(0.002)  # a layer takes its time, and the others go on
                    for expert, view in zip(lease.experts, lease.views):
                        assert view == records[layer, expert], (layer, expert)
                        checked += 1
print(checked, session.host_hits, session.nvme_misses, flush=True)
"""


@pytest.mark.parametrize("killing", [False, True], ids=["calm", "killing"])
def test_many_workers_and_little_room(killing: bool, pack: Path) -> None:
    chance = random.Random(7)
    with (
        serving({"m": pack}, ram=10 * RECORD_BYTES) as daemon,
        Caller(daemon.socket) as caller,
    ):

        def start(seconds: float, seed: int) -> "subprocess.Popen[str]":
            return python(WORKER, daemon.socket, seconds, seed)

        end = time.monotonic() + SECONDS
        workers = [start(SECONDS, seed) for seed in range(NUM_WORKERS)]
        done: list[subprocess.Popen[str]] = []
        eventually(lambda: len(caller.stats().sessions) == NUM_WORKERS)
        while time.monotonic() < end:
            time.sleep(0.3)
            arena = caller.stats().arena
            assert arena.bytes_used <= arena.bytes_total == 10 * RECORD_BYTES
            if killing:
                index = chance.randrange(NUM_WORKERS)
                workers[index].kill()
                done.append(workers[index])
                workers[index] = start(max(0.1, end - time.monotonic()), len(done) + 100)
        checked = hits = misses = 0
        for worker in workers:
            out, err = worker.communicate(timeout=30)
            assert (worker.returncode, err) == (0, "")
            figures = list(map(int, out.split()[1:]))
            checked, hits, misses = checked + figures[0], hits + figures[1], misses + figures[2]
        for worker in done:
            _, err = worker.communicate()
            assert err == "", err
        eventually(lambda: not caller.stats().sessions)
        model = caller.stats().models[0]
        assert checked == hits + misses > 100
        assert model.evictions > 50
        assert model.records_lost == 0
        if not killing:
            assert (model.host_hits, model.nvme_misses) == (hits, misses)
        assert "cut off" not in daemon.stderr
        assert "Traceback" not in daemon.stderr
        assert_serves(daemon.socket)
