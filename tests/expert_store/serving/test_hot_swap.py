"""One model replaces another under a budget that holds either, with workers at both throughout.

Every byte that a worker reads is compared with the pack's. The old model's workers end with a
clear error; the new one's are served all the time.
"""

import subprocess
import time
from pathlib import Path

import pytest

from expertd_client import Client
from expertd_testing.daemon import serving
from expertd_testing.handmade import PAGE, make_pack
from expertd_testing.patience import HANG_SECONDS
from expertd_testing.watching import assert_serves, eventually, python

RECORD_BYTES = {"old": 2 * PAGE, "new": 3 * PAGE}
SEEDS = {"old": 0, "new": 1}
ROOM = 76 * PAGE  # the old model has 48 pages, the new one 72; a token uses 12 and 18
NUM_WORKERS = 2  # of each

WORKER = """
import random, sys, time
from pathlib import Path
from expertd_client import Client, ExpertdError
from expertd_testing.handmade import record

directory, model, record_bytes, seed, seconds, number = sys.argv[1:]
sizes = int(record_bytes), int(seed)
records = {(l, e): record(l, e, *sizes) for l in range(3) for e in range(8)}
chance = random.Random(number)
end = time.monotonic() + float(seconds)
steps, longest = 0, 0.0
with Client(Path(directory), timeout_seconds=20) as store, store.attach(model) as session:
    print("attached", flush=True)
    try:
        while time.monotonic() < end:
            began = time.monotonic()
            for layer in range(3):
                wanted = chance.sample(range(8), chance.choice((2, 2, 8)))
                for lease in session.waves(layer, wanted):
                    with lease:
                        if chance.random() < 0.3:
                            time.sleep(0.002)
                        for expert, view in zip(lease.experts, lease.views):
                            assert view == records[layer, expert], (layer, expert)
            steps += 1
            longest = max(longest, time.monotonic() - began)
        print("done", steps, longest, flush=True)
    except ExpertdError as error:
        print("ended", steps, type(error).__name__, error, flush=True)
"""


@pytest.fixture(scope="module")
def packs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    path = tmp_path_factory.mktemp("swap")
    return {
        name: make_pack(path / name, record_bytes=RECORD_BYTES[name], seed=SEEDS[name])
        for name in SEEDS
    }


def test_hot_swap(packs: dict[str, Path]) -> None:
    with serving({"old": packs["old"]}, ram=ROOM) as daemon, Client(daemon.socket) as client:
        workers: list[subprocess.Popen[str]] = []

        def start(model: str, seconds: float) -> list["subprocess.Popen[str]"]:
            started = [
                python(
                    WORKER, daemon.socket, model, RECORD_BYTES[model], SEEDS[model], seconds, number
                )
                for number in range(NUM_WORKERS)
            ]
            workers.extend(started)
            for worker in started:
                assert worker.stdout is not None
                assert worker.stdout.readline() == "attached\n"
            return started

        def accesses(model: str) -> int:
            (told,) = (each for each in client.stats()["models"] if each["name"] == model)
            return int(told["host_hits"] + told["nvme_misses"])

        def is_all_resident(model: str) -> bool:
            """After it was used once more: its workers may have ended by now."""
            with Client(daemon.socket) as store, store.attach(model) as session:
                for layer in session.model.layers:
                    for lease in session.waves(layer, range(8)):
                        lease.release()
            return bool(client.list_models()[0].num_resident == 24)

        def goes_on(model: str) -> None:
            before = accesses(model)
            eventually(lambda: accesses(model) > before + 50)

        try:
            old = start("old", 60)
            goes_on("old")
            client.load_model("new", packs["new"])
            new = start("new", 4)
            began = time.monotonic()
            goes_on("old")
            goes_on("new")
            assert client.unload_model("old") <= ROOM
            for worker in old:
                said, error = worker.communicate(timeout=30)
                assert (worker.returncode, error) == (0, "")
                verdict, steps, kind, *_ = said.split()
                assert verdict == "ended"
                assert int(steps) > 0
                assert kind in {"PreconditionError", "SessionLostError", "NotFoundError"}, said
            # The room that the old model had is the new one's: all of it gets resident.
            eventually(lambda: is_all_resident("new"))
            for worker in new:
                said, error = worker.communicate(timeout=30)
                assert (worker.returncode, error) == (0, "")
                verdict, steps, longest = said.split()
                assert (verdict, int(steps) > 10) == ("done", True)
                assert float(longest) < HANG_SECONDS, "it was not served for a while"
            assert time.monotonic() - began < 60
            # No room was lost: the old model fits again, beside what the new one leaves.
            stats = client.stats()
            assert stats["arena"]["bytes_used"] == 24 * RECORD_BYTES["new"]
            client.load_model("old", packs["old"])
            assert_serves(daemon.socket, "old", seed=SEEDS["old"])
            assert_serves(daemon.socket, "new", seed=SEEDS["new"])
            stats = client.stats()
            assert stats["arena"]["bytes_used"] <= ROOM
            assert not any(model["records_lost"] for model in stats["models"])
            assert "Traceback" not in daemon.stderr
            assert "cut off" not in daemon.stderr
        finally:
            for worker in workers:
                worker.kill()
                worker.communicate()
