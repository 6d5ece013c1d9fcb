"""What the device runner does when, in virtual time: overlap, joins, syncs, waves."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from expertd_inference.device.cost import Rates
from expertd_inference.settings import OnMiss
from expertd_testing.fake_device import FakeDevice, FakeSpeed, Span, SpanKind
from tests.client.observing import eventually
from tests.inference.device.held_source import HeldPackSource
from tests.inference.device.rig import Rig, make_rig
from tests.inference.greedy import greedy, prompt_of

Make = Callable[..., Any]

# A record of the tiny model takes 4 ms on this link and a kernel 0.4 ms to read.
SLOW_LINK = FakeSpeed(link_bytes_per_second=50e6, memory_bytes_per_second=500e6)


def rig_of(packed: Make, num_slots: int, speed: FakeSpeed = SLOW_LINK, **settings: Any) -> Rig:
    settings = {"on_miss": OnMiss.COPY, "speculate_layers": 0} | settings
    source = HeldPackSource(packed("mixtral"))
    return make_rig(source, FakeDevice(speed=speed), num_slots=num_slots, **settings)


def spans(rig: Rig, kind: SpanKind) -> list[Span]:
    return [span for span in rig.device.log if span.kind is kind]


def overlap(a: Span, b: Span) -> float:
    return min(a.end, b.end) - max(a.begin, b.begin)


def test_the_host_waits_once_per_layer_for_the_routing(packed: Make) -> None:
    rig = rig_of(packed, 24)
    greedy(rig.model, prompt_of(24), 4)
    # A warm cache: nothing is copied, nothing else is waited for.
    rig.device.log.clear()
    before, holds = rig.group.stats, rig.source.num_holds
    greedy(rig.model, prompt_of(24), 6)
    moved = rig.group.stats.since(before)
    assert moved.copies == 0
    assert moved.syncs == 3 * 6
    assert rig.source.num_holds == holds, "nothing of the host is needed"


def test_copies_are_waited_for_at_the_step_s_end_only(packed: Make) -> None:
    rig = rig_of(packed, 6)
    greedy(rig.model, prompt_of(24), 2)
    rig.device.log.clear()
    greedy(rig.model, [7], 1)
    syncs = spans(rig, SpanKind.SYNC)
    copies = spans(rig, SpanKind.COPY)
    assert copies
    # Three routings, and then whatever of the last layer's copies is still on its way.
    routings, waits = syncs[:3], syncs[3:]
    assert len(waits) <= 2
    for wait in waits:
        assert any(copy.end == wait.end for copy in copies)
        assert wait.begin >= routings[-1].end


def test_hits_are_computed_while_misses_are_copied(packed: Make) -> None:
    rig = rig_of(packed, 15)
    greedy(rig.model, prompt_of(24), 24)
    overlaps = [
        (copy, kernel)
        for copy in spans(rig, SpanKind.COPY)
        for kernel in spans(rig, SpanKind.COMPUTE)
        if overlap(copy, kernel) > 0 and not set(copy.slots) & set(kernel.slots)
    ]
    assert len(overlaps) > 10
    stats = rig.group.stats
    assert stats.device_hits > 10
    assert stats.host_hits > 10


def test_no_kernel_reads_what_is_still_copied(packed: Make) -> None:
    rig = rig_of(packed, 8, speculate_layers=1)
    greedy(rig.model, prompt_of(24), 24)
    for copy in spans(rig, SpanKind.COPY):
        for kernel in spans(rig, SpanKind.COMPUTE):
            assert not set(copy.slots) & set(kernel.slots) or overlap(copy, kernel) <= 0


def test_a_prompt_visits_each_expert_once(packed: Make) -> None:
    """8 experts of each of 3 layers, in waves through 4 slots."""
    rig = rig_of(packed, 4)
    prompt = prompt_of(60)
    rig.logits(prompt)
    used = rig.group.stats
    assert used.copies == used.host_hits == 24
    # A wave's copies run while the wave before it is computed.
    copies, kernels = spans(rig, SpanKind.COPY), spans(rig, SpanKind.COMPUTE)
    assert any(overlap(copy, kernel) > 0 for copy in copies for kernel in kernels)


def test_guesses_are_copied_while_the_trunk_computes(packed: Make) -> None:
    rig = rig_of(packed, 10, speculate_layers=1, speculate_experts=2)
    greedy(rig.model, prompt_of(24), 24)
    stats = rig.group.stats
    assert stats.prefetch_useful > 10
    assert stats.prefetch_issued >= stats.prefetch_useful + stats.prefetch_wasted
    routings = spans(rig, SpanKind.SYNC)
    copies = spans(rig, SpanKind.COPY)
    assert sum(overlap(copy, routing) > 0 for copy in copies for routing in routings) > 10


def test_a_late_guess_is_joined_and_not_copied_again(packed: Make) -> None:
    rig = rig_of(packed, 10, speculate_layers=1, speculate_experts=2)
    greedy(rig.model, prompt_of(24), 24)
    stats = rig.group.stats
    assert stats.prefetch_late > 10, "this link is slow"
    assert stats.copies == stats.host_hits + stats.prefetch_issued
    needs = stats.device_hits + stats.host_hits + stats.nvme_misses + stats.prefetch_useful
    no_guesses = rig_of(packed, 10)
    greedy(no_guesses.model, prompt_of(24), 24)
    other = no_guesses.group.stats
    assert needs == other.device_hits + other.host_hits, "each need is counted once"


class Stubborn:
    """A router that guesses the same whatever comes."""

    def __init__(self, *experts: int) -> None:
        self._experts = torch.tensor(experts)

    def likeliest(self, hidden: torch.Tensor, num: int) -> torch.Tensor:
        return self._experts[:num]


def test_wrong_guesses_evict_nothing(packed: Make) -> None:
    """Whatever is guessed, the cache has what it would have had, and hits as often."""
    plain = rig_of(packed, 12)
    greedy(plain.model, prompt_of(24), 24)
    guessing = rig_of(packed, 12 + 2, speculate_layers=1, staging_slots=2)
    (runner,) = guessing.group.runners
    runner.speculate({1: Stubborn(0, 1), 2: Stubborn(7, 5)}, {0: runner, 1: runner, 2: runner})
    greedy(guessing.model, prompt_of(24), 24)
    stats, expected = guessing.group.stats, plain.group.stats
    assert stats.prefetch_wasted > 0
    assert stats.device_hits == expected.device_hits
    assert stats.prefetch_useful + stats.host_hits == expected.host_hits
    (other,) = plain.group.runners
    assert {k: list(v) for k, v in runner.cache._cached.items()} == {
        k: list(v) for k, v in other.cache._cached.items()
    }


def test_speculation_saves_virtual_time(packed: Make) -> None:
    """The ablation of the paper, as far as a tiny model shows it."""
    speed = FakeSpeed(link_bytes_per_second=1e9, trunk_seconds=3e-4)
    seconds = {}
    for name, num_slots, layers in (("full", 14, 1), ("no guesses", 14, 0), ("naive", 2, 0)):
        rig = rig_of(packed, num_slots, speed, speculate_layers=layers)
        rig.logits(prompt_of(24))
        begin = rig.device.clock()
        greedy(rig.model, [7], 32)
        seconds[name] = rig.device.clock() - begin
    assert seconds["full"] < seconds["no guesses"] < seconds["naive"], seconds


def test_the_cpu_takes_its_share(packed: Make) -> None:
    """Where link and CPU are equally fast, both are used; where the CPU is slow, it is not."""

    def computed(cpu: float) -> tuple[int, int]:
        rates = Rates(1e9, 1e-6, cpu, 1e-6, 1e12)
        source = HeldPackSource(packed("mixtral"))
        rig = make_rig(source, num_slots=6, rates=rates, on_miss=OnMiss.AUTO, speculate_layers=0)
        greedy(rig.model, prompt_of(24), 12)
        return rig.group.stats.cpu_computed, rig.group.stats.copies

    on_cpu, copies = computed(2e9)
    assert on_cpu > 5
    assert copies > 24
    assert computed(1e6)[0] == 0


def test_two_devices_share_the_layers(packed: Make, stock: Make) -> None:
    devices = [
        FakeDevice(f"fake:{n}", speed=FakeSpeed(delay_seconds=1e-4), seed=n) for n in range(2)
    ]
    source = HeldPackSource(packed("mixtral"))
    rig = make_rig(source, *devices, num_slots=8)
    prompt = prompt_of(24, seed=1)
    assert greedy(rig.model, prompt, 12) == greedy(stock("mixtral"), prompt, 12)
    first, second = rig.group.runners
    assert (list(first.cache._cached), list(second.cache._cached)) == ([0, 1], [2])
    assert all(spans_of(device) for device in devices)
    # The second device's guesses come from the first one's layers.
    assert rig.group.stats.prefetch_useful > 0
    assert source.lease is None


def spans_of(device: FakeDevice) -> list[Span]:
    return [span for span in device.log if span.kind is SpanKind.COPY]


@pytest.mark.parametrize("absent", ["some", "all"])
def test_what_is_not_in_ram_is_fetched_and_hinted(packed: Make, stock: Make, absent: str) -> None:
    keys = {(layer, expert) for layer in range(3) for expert in range(8)}
    if absent == "some":
        keys = {key for key in keys if sum(key) % 2}
    source = HeldPackSource(packed("mixtral"), wave=3, absent=keys, forgetful=True)
    rig = make_rig(source, num_slots=8, speculate_layers=1)
    prompt = prompt_of(24, seed=1)
    assert greedy(rig.model, prompt, 12) == greedy(stock("mixtral"), prompt, 12)
    stats = rig.group.stats
    assert stats.nvme_misses > 24
    # In a thread of their own; newer ones take the place of those that were not sent yet.
    assert stats.hints > 0
    eventually(lambda: len(source.hinted) > 0)
    assert set(source.hinted) <= keys
    assert (stats.host_hits == 0) == (absent == "all")
