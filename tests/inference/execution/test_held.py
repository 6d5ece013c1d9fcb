"""A step in one native call that stops midway: what is absent, lost or gone is computed again."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.program import ProgramExecutor, make_program
from expertd_inference.experts.cpu import connect
from expertd_inference.experts.recovery import Recovery
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.model.loading import load_trunk
from expertstore.errors import UnavailableError
from tests.inference.device.held_source import HeldPackLease, HeldPackSource
from tests.inference.greedy import prompt_of
from tests.inference.pack_source import PackSource

Make = Callable[..., Any]

pytestmark = pytest.mark.skipif(native_library().library is None, reason="no native library")

NUM_LAYERS, NUM_EXPERTS = 3, 16


class DirectoryLease(HeldPackLease):
    """One whose holder has read the directory by itself."""

    source: "DirectorySource"

    def note(self, entries: Sequence[int]) -> None:
        self.source.noted.append(list(entries))
        if self.source.revokes:
            self.source.revokes -= 1
            self.source.revoke()


@dataclass
class DirectorySource(HeldPackSource):
    """Of the next ``revokes`` leases the session is cut off before their release."""

    revokes: int = 0
    is_gone: bool = False
    noted: list[list[int]] = field(default_factory=list)

    def first_entry(self, layer: int) -> int:
        return self.manifest.first_entries[layer]

    def hold(self) -> DirectoryLease:
        lease = super().hold()
        self.lease = DirectoryLease(self, lease.experts, lease.offsets)
        return self.lease

    def reattach(self, timeout_seconds: float) -> None:
        if self.is_gone:
            raise UnavailableError("The daemon is gone.")
        super().reattach(timeout_seconds)


def executor_of(source: PackSource) -> ProgramExecutor:
    kernels = NativeKernels()
    trunk = load_trunk(source.pack, source.manifest, dtype=torch.float32, linear=kernels.linear)
    recovery = Recovery(source, reattach_seconds=1.0, say=lambda _: None)
    connect(trunk.experts, source.manifest, source, recovery, kernels)
    return make_program(trunk.model, 4, 16)


def step(executor: ProgramExecutor, position: int) -> Tensor:
    """Of a row each of two sequences, which begin with as many rows."""
    spans = []
    for number in range(2):
        text = prompt_of(12, seed=number)
        tokens = text[position : position + 1] if position else text[:6]
        spans.append(Span(number, tokens, position, [number], None, Wanted.LAST))
    return executor.forward(Batch(tuple(spans))).clone()


@pytest.fixture(scope="module")
def expected(packed: Make) -> list[Tensor]:
    """The logits of each step, layer by layer."""
    executor = executor_of(PackSource(packed("olmoe", "4bit")))
    return [step(executor, position) for position in (0, 6, 7, 8)]


@pytest.fixture
def source(packed: Make) -> DirectorySource:
    return DirectorySource(packed("olmoe", "4bit"))


@pytest.fixture
def executor(source: DirectorySource, expected: list[Tensor]) -> ProgramExecutor:
    """One that has computed a step in one native call."""
    executor = executor_of(source)
    assert torch.equal(step(executor, 0), expected[0])
    assert num_done(executor) == NUM_LAYERS
    assert not source.waves_taken
    return executor


def num_done(executor: ProgramExecutor) -> int:
    assert executor._held is not None
    return executor._held.num_done


@pytest.mark.parametrize("layer", range(NUM_LAYERS))
def test_a_layer_with_an_absent_expert_is_asked_by_itself(
    layer: int, source: DirectorySource, executor: ProgramExecutor, expected: list[Tensor]
) -> None:
    source.absent = {(layer, expert) for expert in range(NUM_EXPERTS)}
    assert torch.equal(step(executor, 6), expected[1])
    assert num_done(executor) == layer
    assert [each for each, _ in source.waves_taken] == [*range(layer, NUM_LAYERS)]
    # Those of the layers before were used, and those alone.
    used = {entry // NUM_EXPERTS for entry in source.noted[-1]}
    assert used == set(range(layer))
    # Each is there now.
    source.waves_taken.clear()
    assert torch.equal(step(executor, 7), expected[2])


@pytest.mark.parametrize("absent", [None, 1, 2])
@pytest.mark.parametrize("revokes", [1, 2])
def test_a_step_whose_session_was_cut_off_is_computed_again(
    revokes: int,
    absent: int | None,
    source: DirectorySource,
    executor: ProgramExecutor,
    expected: list[Tensor],
) -> None:
    if absent is not None:
        source.absent = {(absent, expert) for expert in range(NUM_EXPERTS)}
    source.revokes = revokes
    for position, logits in zip((6, 7, 8), expected[1:], strict=True):
        is_cut_off = source.revokes > 0
        assert torch.equal(step(executor, position), logits)
        if is_cut_off:
            # Of what was computed while it was held nothing is believed.
            assert num_done(executor) == 0
            assert [layer for layer, _ in source.waves_taken] == [*range(NUM_LAYERS)]
        source.waves_taken.clear()
    assert source.num_reattached == revokes
    assert source.lease is None
    if absent is None:
        assert num_done(executor) == NUM_LAYERS


def test_a_daemon_that_stays_away_leaves_the_step_to_be_repeated(
    source: DirectorySource, executor: ProgramExecutor, expected: list[Tensor]
) -> None:
    source.revokes, source.is_gone = 1, True
    with pytest.raises(UnavailableError, match="daemon is gone"):
        step(executor, 6)
    assert num_done(executor) == 0
    source.is_gone = False
    for position, logits in zip((6, 7), expected[1:3], strict=True):
        assert torch.equal(step(executor, position), logits)
    assert num_done(executor) == NUM_LAYERS


def test_a_step_of_more_rows_than_may_be_held_asks_layer_by_layer(
    source: DirectorySource, executor: ProgramExecutor
) -> None:
    text = prompt_of(16)
    executor._held._max_rows = 15  # type: ignore[union-attr]
    for num_rows, done in ((15, NUM_LAYERS), (16, 0)):
        executor.forward(Batch((Span(0, text[:num_rows], 0, [0], None, Wanted.LAST),)))
        assert num_done(executor) == done
