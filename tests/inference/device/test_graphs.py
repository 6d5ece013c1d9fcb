"""Recorded steps give what the model gives, and cope with experts that are not in RAM.

The recorder is the fake, whose recordings are garbage until they are replayed and refuse what a
CUDA graph refuses; the experts' own look-up and copies run in Triton's interpreter.
"""

import ctypes
import random
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd_inference.device import whole
from expertd_inference.device.gpu_driven import GpuExperts, StepCounts, share_slots
from expertd_inference.device.graphs import DecodeCache, DecodeGraphs, SegmentSteps
from expertd_inference.device.whole import WholeSteps
from expertd_inference.experts.call import seat_of
from expertd_inference.experts.cpu import connect
from expertd_inference.experts.recovery import Recovery
from expertd_inference.model.loading import TrunkModel, load_trunk
from expertd_testing.fake_device import FakeDevice
from expertd_testing.fake_recorder import FakeRecorder
from expertd_testing.tiny_models import CONFIGS
from expertstore.errors import ExpertdError
from expertstore.shared.directory import pack_word
from tests.inference.greedy import prompt_of
from tests.inference.pack_source import PackSource

Make = Callable[..., Any]
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is for hosts without a GPU"
)
NUM_TOKENS = 6


class Served:
    """A tiny model whose experts are all in memory, and its decoding."""

    def __init__(self, pack: Path) -> None:
        self.source = PackSource(pack)
        self.trunk: TrunkModel = load_trunk(pack, self.source.manifest, dtype=torch.float32)
        recovery = Recovery(self.source, reattach_seconds=1.0, say=lambda _: None)
        connect(self.trunk.experts, self.source.manifest, self.source, recovery)
        self.said: list[str] = []

    @property
    def runners(self) -> dict[int, Any]:
        experts: Mapping[int, Any] = self.trunk.experts
        return {layer: seat_of(module).runner for layer, module in experts.items()}

    @torch.no_grad()
    def decode(self, prompt: Sequence[int], cache: Any) -> tuple[list[int], Tensor]:
        """Greedy tokens, and all logits of the steps."""
        rows, tokens = [], []
        ids = torch.tensor([list(prompt)])
        for _ in range(NUM_TOKENS):
            out = self.trunk.model(input_ids=ids, past_key_values=cache, use_cache=True)
            rows.append(out.logits[:, -1].clone())
            tokens.append(int(rows[-1].argmax()))
            ids = torch.tensor([[tokens[-1]]])
        return tokens, torch.cat(rows)

    def cache(self) -> DecodeCache:
        return DecodeCache(self.trunk.model.config, 64)


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_segments_are_the_model(architecture: str, packed: Make) -> None:
    served = Served(packed(architecture))
    prompt = prompt_of(9)
    # The same cache without recordings: a mask of another size may round otherwise.
    expected = served.decode(prompt, served.cache())
    graphs = DecodeGraphs(
        served.trunk.model,
        served.trunk.experts,
        lambda _, runners=served.runners: SegmentSteps(FakeRecorder(), runners),
        say=served.said.append,
    )
    tokens, logits = served.decode(prompt, served.cache())
    assert tokens == expected[0]
    assert torch.equal(logits, expected[1])
    assert len(set(tokens)) > 2, "a model that repeats itself proves little"
    if architecture == "gpt_oss" and served.said:
        # transformers 5.17 makes its mask of a number from the host.
        assert "lift_fresh" in served.said[0]
        return
    # The prompt, a warm step, a recorded one.
    assert graphs.num_replays == NUM_TOKENS - 3
    assert not served.said
    # Another sequence has another cache, at other addresses.
    other = prompt_of(12, seed=5)
    again = served.decode(other, served.cache())
    assert graphs.num_replays == 2 * (NUM_TOKENS - 3)
    assert again[0] == Served(packed(architecture)).decode(other, served.cache())[0]


def test_a_model_that_cannot_be_recorded_runs_as_before(packed: Make) -> None:
    served = Served(packed("mixtral"))
    expected = served.decode(prompt_of(9), served.cache())
    inner = served.trunk.model.forward

    def reads_a_value(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        assert result.logits.sum().item() is not None
        return result

    served.trunk.model.forward = reads_a_value
    graphs = DecodeGraphs(
        served.trunk.model,
        served.trunk.experts,
        lambda _, runners=served.runners: SegmentSteps(FakeRecorder(), runners),
        say=served.said.append,
    )
    assert served.decode(prompt_of(9), served.cache())[0] == expected[0]
    assert graphs.num_replays == 0
    assert len(served.said) == 1
    assert "not permitted when stream is capturing" in served.said[0]


class Store:
    """A daemon with room for ``room`` records, all absent at first."""

    def __init__(self, source: PackSource, room: int) -> None:
        self.source, self._room = source, room
        self.layers = [
            (
                layer.layer,
                layer.num_experts,
                first,
                source.manifest.layouts[layer.layout].record_bytes,
            )
            for layer, first in zip(
                source.manifest.layers, source.manifest.first_entries, strict=True
            )
        ]
        self._first = {layer: first for layer, _, first, _ in self.layers}
        self._words = (ctypes.c_uint64 * source.manifest.num_experts)()
        self._resident: list[int] = []
        self.held = False
        self.counts: list[StepCounts] = []
        self.num_brought = 0

    @property
    def arena(self) -> int:
        return self.source.arena_address

    def hold(self) -> int:
        assert not self.held
        self.held = True
        return ctypes.addressof(self._words)

    def bring(self, absent: Mapping[int, Sequence[int]]) -> None:
        assert self.held
        self.held = False
        for layer, experts in absent.items():
            for expert in experts:
                self.num_brought += 1
                self._resident.append(self._first[layer] + expert)
                (offset,) = (self.source._offsets[layer, expert],)
                assert offset % 4096 == 0
                self._words[self._resident[-1]] = pack_word(offset, self.num_brought)
        while len(self._resident) > self._room:
            self._words[self._resident.pop(0)] = 0

    def finished(self, counts: StepCounts) -> None:
        self.held = False
        self.counts.append(counts)


def whole_graphs(served: Served, store: Store, num_slots: int) -> DecodeGraphs:
    device = FakeDevice(memory_bytes=1 << 30)
    size = served.source.manifest.max_record_bytes
    slots = device.allocate(num_slots, size)
    layers = share_slots(store.layers, num_slots, 2)
    assert layers is not None

    def make_steps(cache: DecodeCache) -> WholeSteps:
        recorder = FakeRecorder()
        experts = GpuExperts(device, slots, layers, store.arena, recorder)
        return WholeSteps(experts, recorder, store, cache.rewind)

    return DecodeGraphs(
        served.trunk.model, served.trunk.experts, make_steps, say=served.said.append
    )


@interpreted
@pytest.mark.parametrize(
    ("architecture", "slots_each", "room"),
    [
        ("mixtral", 8, 24),  # everything fits everywhere
        ("mixtral", 2, 24),  # only the top k of each layer on the device
        ("qwen3_moe", 3, 4),  # most of what is needed is not in RAM, time and again
    ],
)
def test_a_whole_step_is_the_model(
    architecture: str, slots_each: int, room: int, packed: Make
) -> None:
    served = Served(packed(architecture))
    expected = served.decode(prompt_of(9), served.cache())
    store = Store(served.source, room)
    graphs = whole_graphs(served, store, slots_each * len(store.layers))
    tokens, logits = served.decode(prompt_of(9), served.cache())
    assert not served.said
    assert tokens == expected[0]
    assert torch.equal(logits, expected[1])
    assert graphs.num_replays == NUM_TOKENS - 3
    assert store.num_brought >= 2 * len(store.layers)
    assert len(store.counts) == NUM_TOKENS - 1
    # Every step used two experts of each layer, from one place or the other.
    assert all(not counts.absent for counts in store.counts)


@interpreted
def test_what_is_in_ram_costs_no_call(packed: Make) -> None:
    served = Served(packed("mixtral"))
    store = Store(served.source, 24)
    store.held = True
    store.bring({layer: range(8) for layer, *_ in store.layers})
    brought = store.num_brought
    whole_graphs(served, store, 6)
    served.decode(prompt_of(9), served.cache())
    assert store.num_brought == brought
    assert all(c.num_hits + c.num_copied == 6 for c in store.counts)
    assert sum(c.num_copied for c in store.counts) > 6


@interpreted
def test_an_arena_elsewhere_is_recorded_anew(packed: Make) -> None:
    served = Served(packed("mixtral"))
    expected = served.decode(prompt_of(9), served.cache())
    store = Store(served.source, 24)
    graphs = whole_graphs(served, store, 6)
    cache = served.cache()
    model, ids = served.trunk.model, torch.tensor([prompt_of(9)])
    tokens = []
    with torch.no_grad():
        for step in range(NUM_TOKENS):
            if step == 3:
                served.source.reattach(1.0)
                # What was resident is no longer known.
                store.__init__(served.source, 24)  # type: ignore[misc]
            out = model(input_ids=ids, past_key_values=cache, use_cache=True)
            tokens.append(int(out.logits[0, -1].argmax()))
            ids = torch.tensor([[tokens[-1]]])
    assert tokens == expected[0]
    assert graphs.num_replays == NUM_TOKENS - 3 - 2


@interpreted
def test_a_step_that_never_completes_is_an_error(
    packed: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = Served(packed("mixtral"))
    store = Store(served.source, 0)
    monkeypatch.setattr(whole, "MAX_REPEATS", 3)
    whole_graphs(served, store, 6)
    with pytest.raises(ExpertdError, match="--ram"):
        served.decode(prompt_of(9), served.cache())


def test_too_few_slots_have_no_shares() -> None:
    layers = [(layer, 8, layer * 8, 4096) for layer in range(4)]
    assert share_slots(layers, 7, 2) is None
    shares = share_slots(layers, 9, 2)
    assert shares is not None
    assert [(each.first_slot, each.num_slots) for each in shares] == [
        (0, 2),
        (2, 2),
        (4, 2),
        (6, 2),
    ]


def test_a_recording_is_garbage_until_it_is_replayed() -> None:
    recorder = FakeRecorder()
    given, kept = torch.tensor([1.0, 2.0]), torch.zeros(2)
    chance = random.Random(0)
    calls: list[float] = []
    with recorder.session():
        recorder.begin()
        doubled = given * 2
        kept.add_(doubled)
        recorder.launch(lambda: calls.append(chance.random()))
        view = doubled[1:]
        recording = recorder.end()
    assert doubled.isnan().all()
    assert not kept.any()
    assert not calls
    recording.replay()
    given.fill_(5.0)
    recording.replay()
    assert kept.tolist() == [12.0, 14.0]
    assert view.tolist() == [10.0]
    assert len(calls) == 2
    recorder.begin()
    with pytest.raises(RuntimeError, match="capturing"):
        float(given.sum())
    recorder.abandon()
    assert float(given.sum()) == 10.0
