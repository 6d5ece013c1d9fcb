"""The GPU's own look-up and copy against a plain model of the same policy.

Here under Triton's interpreter, which reads the arena in host memory by address; on a GPU, from
pinned memory, the same tests run as they are (``make gpu-test``).
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from expertstore.shared.directory import PAGE_BYTES, pack_word
from tests.inference.kernels.gpu.gpu import DEVICE, host_memory

triton_gather = pytest.importorskip("expertd_inference.kernels.gpu.triton_gather")

SLOT_BYTES = 3 * PAGE_BYTES


@dataclass
class Model:
    """The policy in plain Python: least recently used, what this call needs never evicted."""

    num_slots: int
    holds: list[int | None] = field(init=False)
    used: list[int] = field(init=False)
    clock: int = 0

    def __post_init__(self) -> None:
        self.holds, self.used = [None] * self.num_slots, [0] * self.num_slots

    def call(self, experts: Sequence[int], resident: set[int]) -> tuple[int, list[int], list[int]]:
        """Hits, those copied in order, those absent."""
        self.clock += 1
        wanted = list(dict.fromkeys(experts))
        hits = [expert for expert in wanted if expert in self.holds]
        for expert in hits:
            self.used[self.holds.index(expert)] = self.clock
        copied = [expert for expert in wanted if expert not in hits and expert in resident]
        for expert in copied:
            victim = self.used.index(min(self.used))
            self.holds[victim], self.used[victim] = expert, self.clock
        return len(hits), copied, [e for e in wanted if e not in hits and e not in resident]


class Host:
    """A directory and an arena in memory that the device reads by address."""

    def __init__(self, num_entries: int, record_bytes: int = SLOT_BYTES) -> None:
        self.num_entries, self.record_bytes = num_entries, record_bytes
        self.words = torch.zeros(num_entries, dtype=torch.int64)
        self.arena = host_memory(PAGE_BYTES + num_entries * SLOT_BYTES)
        generator = torch.Generator().manual_seed(num_entries)
        self.arena.tensor.random_(0, 256, generator=generator)
        # Not in order, and the first page is nobody's: an offset taken for another shows.
        places = random.Random(1).sample(range(num_entries), num_entries)
        self.offsets = [PAGE_BYTES + place * SLOT_BYTES for place in places]

    def set_resident(self, entries: set[int]) -> None:
        for entry, offset in enumerate(self.offsets):
            # A generation that fills the upper half: it must not leak into the offset.
            word = pack_word(offset, 0xFFFFFF00 + entry) if entry in entries else 0
            # torch has no unsigned 64-bit numbers to speak of.
            self.words[entry] = word - (1 << 64) if word >> 63 else word

    def record(self, entry: int) -> Tensor:
        start = self.offsets[entry]
        return self.arena.tensor[start : start + self.record_bytes]


@pytest.mark.parametrize(
    ("tokens", "k", "experts", "slots", "record_bytes"),
    [
        (1, 2, 8, 2, SLOT_BYTES),  # exactly the top k: everything else is evicted
        (1, 8, 64, 20, SLOT_BYTES),  # a number of slots that is no power of two
        (1, 3, 5, 5, PAGE_BYTES + 8),  # all fit; a record that ends inside a turn
        (8, 6, 40, 40, SLOT_BYTES),  # several tokens choose one expert
        (1, 1, 4, 1, SLOT_BYTES),  # numbers of 1, which Triton makes constants
        (3, 4, 9, 9, SLOT_BYTES),  # more choices than experts
    ],
)
def test_it_decides_as_the_model_does(
    tokens: int, k: int, experts: int, slots: int, record_bytes: int
) -> None:
    layers = 2
    chance = random.Random(tokens * 100 + slots)
    host = Host(layers * experts, record_bytes)
    table = triton_gather.SlotTable.empty(layers * experts, layers * slots, DEVICE)
    resolution = triton_gather.Resolution.empty(layers * experts, DEVICE)
    cache = torch.zeros(layers * slots, SLOT_BYTES, dtype=torch.uint8, device=DEVICE)
    models = [Model(slots) for _ in range(layers)]
    for step in range(12):
        resident = set(chance.sample(range(layers * experts), chance.randint(k, layers * experts)))
        host.set_resident(resident if step % 4 else set(range(layers * experts)))
        if not step % 4:
            resident = set(range(layers * experts))
        resolution.begin_step()
        expected = [0, 0, 0]
        for layer, model in enumerate(models):
            first = layer * experts
            rows = [chance.sample(range(experts), k) for _ in range(tokens)]
            triton_gather.resolve(
                torch.tensor(rows, device=DEVICE),
                table,
                resolution,
                directory=host.words.to(DEVICE),
                num_experts=experts,
                first_entry=first,
                first_slot=layer * slots,
                num_slots=slots,
            )
            triton_gather.gather(
                resolution,
                cache,
                arena=host.arena.address,
                num_items=tokens * k,
                record_bytes=record_bytes,
            )
            given_up = expected[2] > 0
            here = {entry - first for entry in resident if first <= entry < first + experts}
            flat = [expert for row in rows for expert in row]
            if given_up:  # nothing more is copied or called absent, hits still count
                here = set()
            hits, copied, absent = model.call(flat, here)
            expected[0] += hits
            expected[1] += len(copied)
            expected[2] += 0 if given_up else len(absent)
            held = table.slot_of[first : first + experts].tolist()
            assert held == [
                layer * slots + model.holds.index(e) if e in model.holds else -1
                for e in range(experts)
            ]
            for expert, slot in enumerate(held):
                if slot >= 0:
                    ours = cache[slot, :record_bytes].cpu()
                    assert torch.equal(ours, host.record(first + expert))
            if not given_up:
                noted = resolution.noted[first : first + experts].tolist()
                for note, entries in (
                    (triton_gather.COPIED, copied),
                    (triton_gather.ABSENT, absent),
                ):
                    assert [e for e, n in enumerate(noted) if n == note] == sorted(entries)
        assert resolution.counts.tolist() == expected


def test_a_word_that_was_read_while_it_changed_is_absent() -> None:
    host = Host(4)
    host.set_resident({0, 1, 2, 3})
    host.words[2] &= ~0xFFFFFFFF  # the generation is there yet, the place is not
    table = triton_gather.SlotTable.empty(4, 4, DEVICE)
    resolution = triton_gather.Resolution.empty(4, DEVICE)
    triton_gather.resolve(
        torch.tensor([[1, 2]], device=DEVICE),
        table,
        resolution,
        directory=host.words.to(DEVICE),
        num_experts=4,
        first_entry=0,
        first_slot=0,
        num_slots=4,
    )
    assert resolution.noted.tolist() == [0, triton_gather.COPIED, triton_gather.ABSENT, 0]


def test_choices_past_the_last_expert_are_none() -> None:
    host = Host(4)
    host.set_resident({0, 1, 2, 3})
    table = triton_gather.SlotTable.empty(4, 4, DEVICE)
    resolution = triton_gather.Resolution.empty(4, DEVICE)
    triton_gather.resolve(
        torch.tensor([[4, 2, -1]], device=DEVICE),
        table,
        resolution,
        directory=host.words.to(DEVICE),
        num_experts=4,
        first_entry=0,
        first_slot=0,
        num_slots=4,
    )
    assert table.slot_of.tolist() == [-1, -1, 0, -1]
    assert resolution.source.tolist()[:4] == [-1, host.offsets[2], -1, -1]
    assert resolution.counts.tolist() == [0, 1, 0]


@pytest.mark.parametrize(
    ("routing", "num_slots", "what"),
    [
        (torch.zeros(1, 3, dtype=torch.int64), 2, "slots"),
        (torch.zeros(0, 2, dtype=torch.int64), 4, "routed"),
        (torch.zeros(65, 2, dtype=torch.int64), 200, "routed"),
        (torch.zeros(2, 4, dtype=torch.int64).T, 8, "contiguous"),
    ],
)
def test_what_cannot_be_resolved_is_refused(routing: Tensor, num_slots: int, what: str) -> None:
    table = triton_gather.SlotTable.empty(128, 200, DEVICE)
    with pytest.raises(ValueError, match=what):
        triton_gather.resolve(
            routing.to(DEVICE),
            table,
            triton_gather.Resolution.empty(128, DEVICE),
            directory=torch.zeros(128, dtype=torch.int64, device=DEVICE),
            num_experts=128,
            first_entry=0,
            first_slot=0,
            num_slots=num_slots,
        )
