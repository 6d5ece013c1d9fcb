"""States of a step that is lost are as they were."""

import pytest
import torch

from expertd_inference.kv.state_memory import StateMemory, StateShape


@pytest.mark.parametrize("slots", [[2], [2, 0]])
def test_a_step_counts_once_it_is_kept(slots: list[int]) -> None:
    memory = StateMemory({"s": StateShape((2, 3), torch.float32)}, 3)
    begun = torch.rand(len(slots), 2, 3)
    memory.scatter(slots, {"s": begun})
    memory.keep(slots)
    for _ in range(2):  # a lost step, and its repetition
        (gathered,) = memory.gather(slots, ["s"]).values()
        assert torch.equal(gathered, begun)
        gathered += 1  # as a layer may change what it is given
        memory.scatter(slots, {"s": gathered})
    assert torch.equal(memory.states["s"][memory.now(slots)], begun)
    memory.keep(slots)
    assert torch.equal(memory.states["s"][memory.now(slots)], begun + 1)


def test_a_slot_s_places_are_its_own() -> None:
    memory = StateMemory({"s": StateShape((1,), torch.float32)}, 4)
    memory.keep([1, 3])
    places = memory.now(range(4)) + memory.next(range(4))
    assert sorted(places) == list(range(8))
