"""Recorded steps over blocks, on a fake device: what the modules give, for any number of rows."""

import gc
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd_inference.execution import graphs, on_device
from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.executor import Executor
from expertd_inference.execution.graphs import GraphsExecutor
from expertd_inference.execution.modules import ModulesExecutor
from expertd_inference.execution.room import Room
from expertd_inference.fewer_experts import FewerExperts
from expertd_inference.settings import DecodeGraphsMode, OnMiss
from tests.inference.device.held_source import HeldPackSource
from tests.inference.device.rig import Rig, make_rig
from tests.inference.device.stepping import repeated
from tests.inference.greedy import prompt_of

Make = Callable[..., Any]
SEGMENTS, WHOLE, OFF = DecodeGraphsMode.SEGMENTS, DecodeGraphsMode.WHOLE, DecodeGraphsMode.OFF
ROOM = Room(num_blocks=12, num_sequences=4, num_rows=64)
# Longer than a block, as long as one, and short.
PROMPTS = [prompt_of(length, seed=length) for length in (70, 63, 5)]
TABLES = [[7, 2, 4], [3, 9], [0, 11]]
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is for hosts without a GPU"
)


def rig_of(pack: Any, mode: DecodeGraphsMode, num_slots: int = 9, **settings: Any) -> Rig:
    settings = {"on_miss": OnMiss.COPY, "speculate_layers": 0} | settings
    return make_rig(
        HeldPackSource(pack),
        num_slots=num_slots,
        dtype=torch.float32,
        stepped=False,
        decode_graphs=mode,
        **settings,
    )


def executor_of(rig: Rig, said: list[str] | None = None, room: Room = ROOM) -> Executor:
    say = [].append if said is None else said.append
    return on_device.device_executor(rig.model, rig.group, room, 256, say)


def decode(
    executor: Executor, steps: Sequence[Sequence[int]], wanted: Wanted = Wanted.LAST
) -> list[Tensor]:
    """The logits of the prompts, then of steps in which these sequences go on by a given token."""
    texts = [list(prompt) for prompt in PROMPTS]
    spans = [
        Span(number, text, 0, TABLES[number], None, Wanted.LAST)
        for number, text in enumerate(texts)
    ]
    found = [repeated(executor, Batch(tuple(spans)))]
    for step, sequences in enumerate(steps):
        spans = []
        for number in sequences:
            token = (7 * step + 3 * number) % 256
            position = len(texts[number])
            spans.append(Span(number, [token], position, TABLES[number], None, wanted))
            texts[number].append(token)
        found.append(repeated(executor, Batch(tuple(spans))))
    return found


STEPS = [[0, 1, 2], [1], [2, 0], [1, 2], [0, 1, 2], [0]]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.shape == theirs.shape
        # Attention over padded tables adds in another order.
        assert torch.allclose(ours, theirs, atol=2e-4)
    assert len({int(row.argmax()) for row in torch.cat(found)}) > 2, "it says little"


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_segments_give_the_modules_logits(architecture: str, packed: Make) -> None:
    pack = packed(architecture)
    modules = executor_of(rig_of(pack, OFF))
    assert isinstance(modules, ModulesExecutor)
    said: list[str] = []
    rig = rig_of(pack, SEGMENTS)
    executor = executor_of(rig, said)
    assert isinstance(executor, GraphsExecutor), said
    assert_same(decode(executor, STEPS), decode(modules, STEPS))
    assert rig.group.num_replays == len(STEPS)
    assert not said


@interpreted
def test_whole_steps_give_the_modules_logits(packed: Make) -> None:
    pack = packed("mixtral")
    rig = rig_of(pack, WHOLE, num_slots=24)
    executor = executor_of(rig)
    assert isinstance(executor, GraphsExecutor)
    assert executor.mode is WHOLE
    assert_same(decode(executor, STEPS), decode(executor_of(rig_of(pack, OFF)), STEPS))
    assert rig.group.num_replays == len(STEPS)
    assert rig.group.stats.steps == "whole"
    few = Span(0, [5], 76, TABLES[0], None, Wanted.LAST, fewer=FewerExperts(1))
    repeated(executor, Batch((few,)))
    assert rig.group.num_replays == len(STEPS), "it was recorded with all experts"
    assert executor.tally.num_rows == executor.tally.num_experts == 3, "of three layers"


@interpreted
def test_what_is_not_in_ram_repeats_a_whole_step(packed: Make) -> None:
    pack = packed("mixtral")
    absent = {(layer, expert) for layer in range(3) for expert in range(0, 8, 2)}
    rig = rig_of(pack, WHOLE, num_slots=24)
    executor = executor_of(rig)
    rig.source.absent |= absent
    rig.source.forgetful = True
    assert_same(decode(executor, STEPS), decode(executor_of(rig_of(pack, OFF)), STEPS))
    assert rig.group.stats.nvme_misses > 12
    assert rig.source.lease is None


@interpreted
def test_an_arena_elsewhere_is_recorded_anew(packed: Make) -> None:
    pack = packed("mixtral")
    rig = rig_of(pack, WHOLE, num_slots=24)
    executor = executor_of(rig)
    expected = decode(executor_of(rig_of(pack, OFF)), STEPS)
    assert_same(decode(executor, STEPS), expected)
    rig.source.reattach(1)
    assert_same(decode(executor, STEPS), expected)
    assert rig.group.num_replays == 2 * len(STEPS)


@pytest.mark.parametrize("mode", [SEGMENTS, pytest.param(WHOLE, marks=interpreted)])
def test_rows_that_a_batch_lacks_ask_for_no_expert(mode: DecodeGraphsMode, packed: Make) -> None:
    """Three sequences in a step recorded for four; one in whose place another was before."""
    used = []
    for each in (mode, OFF):
        rig = rig_of(packed("mixtral"), each, num_slots=24)
        decode(executor_of(rig), STEPS)
        stats = rig.group.stats
        used.append(stats.device_hits + stats.host_hits)
        assert stats.steps == each.value
    assert used[0] == used[1]


def test_tables_of_several_widths(packed: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graphs, "SHORT_TOKENS", 64)
    pack = packed("qwen3_moe")
    rig = rig_of(pack, SEGMENTS)
    executor = executor_of(rig)
    assert isinstance(executor, GraphsExecutor)
    # 256 tokens are four blocks at most.
    assert {width for _, width in executor._steps} == {1, 4}
    assert {size for size, _ in executor._steps} == {1, 2, 4}
    assert_same(decode(executor, STEPS), decode(executor_of(rig_of(pack, OFF)), STEPS))
    assert rig.group.num_replays == len(STEPS)


def test_a_step_whose_attention_would_copy_too_much_is_not_recorded(
    packed: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = packed("qwen3_moe")
    rig = rig_of(pack, SEGMENTS)
    monkeypatch.setattr(graphs, "MAX_GATHERED_BYTES", 2 * 4 * 64 * 2 * 32 * 4)
    executor = executor_of(rig)
    assert isinstance(executor, GraphsExecutor)
    assert {size for size, _ in executor._steps} == {1, 2}, "tables of four blocks"
    assert_same(decode(executor, STEPS), decode(executor_of(rig_of(pack, OFF)), STEPS))
    assert rig.group.num_replays == 4, "those of one and two"


def test_what_is_not_recorded_is_computed_by_modules(packed: Make) -> None:
    """A text that is longer than any was to be; a step of which nothing is wanted."""
    pack = packed("mixtral")
    rig = rig_of(pack, SEGMENTS)
    executor = on_device.device_executor(rig.model, rig.group, ROOM, 64, [].append)
    assert isinstance(executor, GraphsExecutor)
    found = decode(executor, [[1], [1], [2], [0]])
    assert_same(found, decode(executor_of(rig_of(pack, OFF)), [[1], [1], [2], [0]]))
    assert rig.group.num_replays == 2, "63 + 1 tokens, and the short one's"
    assert decode(executor, [[1, 2]], Wanted.NONE)[1].shape == (0, 257)


def test_nan_stays_in_its_sequence(packed: Make) -> None:
    """Also once its blocks are another's."""
    pack = packed("mixtral")
    rig = rig_of(pack, SEGMENTS)
    executor = executor_of(rig)
    assert isinstance(executor, GraphsExecutor)
    for memory in (*executor._modules.memory.keys, *executor._modules.memory.values):
        memory.fill_(torch.nan)
    assert_same(decode(executor, STEPS), decode(executor_of(rig_of(pack, OFF)), STEPS))


@pytest.mark.parametrize("mode", [SEGMENTS, OFF])
@pytest.mark.parametrize("lost", [{0}, {0, 1}, {1}, {2, 4, 5}])
def test_a_step_that_is_lost_is_repeated(
    mode: DecodeGraphsMode, lost: set[int], packed: Make
) -> None:
    """At its end, when all was appended: the same is appended again."""
    pack = packed("mixtral")
    expected = decode(executor_of(rig_of(pack, mode, num_slots=4)), STEPS)
    # Fewer slots than a row needs over all layers: each step copies.
    rig = rig_of(pack, mode, num_slots=4)
    executor = executor_of(rig)
    finish, ends, happened = rig.group.transaction._finish, iter(range(1000)), []

    def losing() -> None:
        if (number := next(ends)) in lost:
            assert rig.group.transaction.hold._copies, "a step that copied nothing loses nothing"
            rig.source.revoke()
            happened.append(number)
        finish()

    rig.group.transaction._finish = losing  # type: ignore[method-assign]
    found = decode(executor, STEPS)
    assert happened == sorted(lost)
    assert next(ends) == 1 + len(STEPS) + len(lost), "a step more for each that was lost"
    assert all(map(torch.equal, found, expected))


def test_a_model_that_cannot_be_recorded_is_computed_by_its_modules(packed: Make) -> None:
    rig = rig_of(packed("mixtral"), SEGMENTS)
    inner = rig.model.forward

    def reads_a_value(*args: Any, **kwargs: Any) -> Any:
        result = inner(*args, **kwargs)
        assert result.logits.sum().item() is not None
        return result

    rig.model.forward = reads_a_value
    said: list[str] = []
    executor = executor_of(rig, said)
    assert executor.name == "modules"
    assert len(said) == 1
    assert "not permitted when stream is capturing" in said[0]
    assert_same(decode(executor, STEPS), decode(executor_of(rig_of(packed("mixtral"), OFF)), STEPS))


def test_closing_lets_go(packed: Make) -> None:
    rig = rig_of(packed("mixtral"), SEGMENTS)
    executor = executor_of(rig)
    assert isinstance(executor, GraphsExecutor)
    decode(executor, STEPS[:1])
    step = weakref.ref(executor._steps[1, 4])
    executor.close()
    gc.collect()
    assert step() is None
    executor.close()
