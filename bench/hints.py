"""Part 3: how long a demanded record waits because others are being read ahead."""

import random
import time
from collections.abc import Iterator

from bench.cold import median_read_seconds
from bench.figures import Bench, Figure, counted, timed
from bench.page_cache import write_out
from expertd_client import Client, Session
from expertd_testing.daemon import serving
from expertd_testing.handmade import make_pack

_RECORD_BYTES = 1728 << 10
_EXPERTS = 32
_HINTED = 8
_PER_TURN = 2 + _HINTED + 1


def measure(bench: Bench) -> Iterator[Figure]:
    """One record fetched alone and while 8 others are hinted, in turns."""
    layers = max(1, bench.pack_bytes // (_EXPERTS * _RECORD_BYTES))
    bench.say("hints: a pack")
    pack = make_pack(
        bench.folder / "hints", layers=layers, experts=_EXPERTS, record_bytes=_RECORD_BYTES
    )
    write_out(pack)
    count = layers * _EXPERTS
    one = median_read_seconds(pack, _RECORD_BYTES, min(count, 64))
    experts = [divmod(entry, _EXPERTS) for entry in random.Random(0).sample(range(count), count)]
    delays = []
    with (
        serving(
            {"m": pack},
            ram=count * _RECORD_BYTES,
            socket=bench.folder / "hints-s",
            arguments=["--disk-io", "direct"],
        ) as daemon,
        Client(daemon.socket) as store,
        store.attach("m") as asker,
        store.attach("m") as hinter,
    ):
        for start in range(0, count - _PER_TURN + 1, _PER_TURN):
            bench.say(f"hints: {start} of {count}")
            alone, beside, last, *hinted = experts[start : start + _PER_TURN]
            quiet = _fetch(asker, alone)
            hinter.prefetch(hinted)
            busy = _fetch(asker, beside)
            hinter.prefetch([last])  # in place of those that have not begun
            _settle(hinter, last)
            delays.append((busy - quiet) / one)
    yield counted("hints", "demanded record delayed by reads ahead", "records", delays, at_most=1.0)


def _fetch(session: Session, expert: tuple[int, int]) -> float:
    layer, number = expert
    return timed(lambda: session.acquire(layer, [number]).release())


def _settle(session: Session, last: tuple[int, int]) -> None:
    """Until nothing is read any more."""
    deadline = time.monotonic() + 10
    while session.prefetch([last]) and time.monotonic() < deadline:
        time.sleep(0.002)
