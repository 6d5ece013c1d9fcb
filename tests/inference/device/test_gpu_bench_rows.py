"""The rows of the GPU benches: what they count, what bounds them, what they leave behind."""

import time
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu_bound import Launches, Rates
from bench.gpu_copies import Turn, check_arrival, gathered
from bench.gpu_decoder import CACHE_TOKENS, FAKE_TOKENS, LONG_CACHE_TOKENS, Decoder
from bench.gpu_rig import Rig, writable_memory
from bench.gpu_routing import Routing, swept
from bench.gpu_ways import LONG, MIDDLE, NO_SPECULATION, SEGMENTS, WAYS, WHOLE
from expertd_client import Client
from expertd_inference.device.device import Device
from expertd_testing.daemon import serving
from expertd_testing.fake_device import FakeDevice

Make = Callable[..., Any]
RATES = Rates(link=50e9, memory=4e12, eager_launch=4e-6, recorded_launch=2e-6)


@pytest.mark.parametrize(
    ("copied", "read", "launches", "by", "seconds"),
    [
        (500e6, 2e9, Launches(recorded=3000), "link", 0.01),
        (0, 40e9, Launches(recorded=3000), "memory", 0.01),
        (0, 2e9, Launches(recorded=5000), "launches", 0.01),
        (0, 2e9, Launches(eager=1000, recorded=3000), "launches", 0.01),
    ],
)
def test_a_token_is_bound_by_what_takes_longest(
    copied: float, read: float, launches: Launches, by: str, seconds: float
) -> None:
    bound = RATES.bound(copied, read, launches)
    assert bound.by == by
    assert bound.seconds == pytest.approx(seconds)


def test_a_sweep_uses_every_expert_of_every_layer() -> None:
    routing, tokens = swept(Routing(torch.zeros(3, 2, 4, dtype=torch.int64), ""), 10)
    assert tokens == 3
    for layer in range(2):
        assert set(routing.experts[:tokens, layer].flatten().tolist()) == set(range(10))
    assert (routing.experts[tokens:] == 0).all()


def test_a_copy_counts_the_records_that_arrive() -> None:
    pytest.importorskip("triton")
    count, size = 202, 4096
    anchor, address = writable_memory(count * size)
    device = FakeDevice(memory_bytes=1 << 30)
    slots = device.allocate(count, size)
    memory = device.register(address, count * size)
    turn = gathered(device, memory, count, size, slots)
    assert turn.num_records == 128
    check_arrival(device, turn, address, slots)
    with pytest.raises(RuntimeError, match="record 201 of 202 did not arrive"):
        check_arrival(device, Turn(count, turn.run), address, slots)
    with pytest.raises(RuntimeError, match="more than 127 records"):
        check_arrival(device, Turn(127, turn.run), address, slots)
    memory.close()
    del anchor


class WatchedRig(Rig):
    """Knows what its devices have allocated."""

    def open_device(self, *, staged: bool = False) -> Device:
        device = FakeDevice("fake:0", memory_bytes=1 << 30, registers=not staged)
        allocate = device.allocate

        def watched(num_slots: int, slot_bytes: int) -> Tensor:
            slots = allocate(num_slots, slot_bytes)
            ALLOCATED.append(weakref.ref(slots))
            return slots

        device.allocate = watched  # type: ignore[method-assign]
        return device


ALLOCATED: list[weakref.ref[Tensor]] = []


@pytest.fixture(scope="module")
def decoder(packed: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Decoder]:
    pytest.importorskip("triton")
    pack: Path = packed("example", "4bit")
    rig = WatchedRig(tmp_path_factory.mktemp("rig"), lambda _: None, time.monotonic(), fake=True)
    with (
        serving({"m": pack}) as daemon,
        Client(daemon.socket) as client,
        client.attach("m") as session,
    ):
        yield Decoder(rig, "example", pack, session)


@pytest.mark.parametrize("way", [NO_SPECULATION, SEGMENTS, WHOLE], ids=lambda way: way.name)
def test_what_a_way_had_on_the_gpu_is_gone_after_it(way: Any, decoder: Decoder) -> None:
    del ALLOCATED[:]
    decoded = decoder.decode(way.device_settings(decoder.manifest, MIDDLE, fake=True))
    assert decoded.state.steps == {"no speculation": "off"}.get(way.name, way.name)
    assert decoded.state.arena == "registered"
    assert len(decoded.seconds) == FAKE_TOKENS
    assert ALLOCATED
    assert not [slots for slots in ALLOCATED if slots() is not None], "its slots are kept"


def test_all_cached_misses_nothing(decoder: Decoder) -> None:
    room = decoder.manifest.expert_bytes
    decoded = decoder.decode(NO_SPECULATION.device_settings(decoder.manifest, room, fake=False))
    assert decoded.misses == 0
    assert decoded.hits == 1
    assert decoded.cached(room, room) == "all cached"
    missed = replace(decoded, moved=replace_stats(decoded.moved, host_hits=3))
    assert missed.cached(room, room) == "room for all, 3 misses"
    assert missed.cached(1 << 20, room) == "a cache of 1.0 MiB"


def test_a_row_says_that_copies_were_staged(decoder: Decoder) -> None:
    settings = NO_SPECULATION.device_settings(decoder.manifest, MIDDLE, fake=True)
    assert decoder.decode(settings, staged=True).state.arena == "staged"


def test_what_length_costs_is_measured() -> None:
    lengths = {way.cache_tokens for way in WAYS}
    assert lengths == {CACHE_TOKENS, LONG_CACHE_TOKENS}
    assert LONG.settings == WHOLE.settings
    assert CACHE_TOKENS >= 1024


def replace_stats(stats: Any, **changes: int) -> Any:
    changed = stats.copy()
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed
