"""What whole steps are made of, and what recordings are."""

import random
from collections.abc import Mapping, Sequence

import pytest
import torch

from expertd_inference.device import whole
from expertd_inference.device.gpu_driven import StepCounts, share_slots
from expertd_inference.device.whole import WholeExperts
from expertd_testing.fake_recorder import FakeRecorder
from expertstore.errors import ExpertdError


class NeverThere:
    """Experts of a daemon that has no room for them, and the session, at once."""

    arena = 0
    num_brought = 0

    def hold(self) -> int:
        return 0

    def begin_step(self, directory: int) -> None:
        pass

    def end_step(self) -> StepCounts:
        return StepCounts(0, {}, {1: [3]})

    def bring(self, absent: Mapping[int, Sequence[int]]) -> None:
        assert absent == {1: [3]}
        self.num_brought += 1

    def finished(self, counts: StepCounts) -> None:
        raise AssertionError


def test_a_step_that_never_completes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(whole, "MAX_REPEATS", 3)
    store = NeverThere()
    attempts: list[int] = []
    experts = WholeExperts(store, store)  # type: ignore[arg-type]
    with pytest.raises(ExpertdError, match="--ram"):
        experts.until_complete(lambda: attempts.append(1))
    assert store.num_brought == len(attempts) == 3


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
