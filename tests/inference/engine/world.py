"""An executor whose scores depend on every cell of a sequence's blocks, and on nothing else."""

from array import array
from collections.abc import Sequence as Tokens
from itertools import pairwise
from zlib import crc32

from expertd_inference.engine.limits import SchedulerLimits
from expertd_inference.engine.scheduler import Scheduler, StepPlan
from expertd_inference.engine.sequence import Sequence, SequencePhase
from expertd_inference.execution.batch import Span, Wanted
from expertd_inference.kv.pool import BLOCK_TOKENS, BlockPool

NUM_TOKENS = 40
END = 0


def _mix(value: int, *more: int) -> int:
    return crc32(array("q", more).tobytes(), value)


def text_alone(prompt: Tokens[int], max_new: int, turning_point: int | None = None) -> list[int]:
    """The naive model: what follows ``prompt`` if every cell is what its tokens make it.

    Cells of a text of more tokens than ``turning_point`` are others, from the first on.
    """
    tokens = list(prompt)
    while True:
        value = _first(len(tokens), turning_point)
        cells = [value := _mix(value, token) for token in tokens]
        tokens.append(_mix(7, *cells) % NUM_TOKENS)
        if tokens[-1] == END or len(tokens) == len(prompt) + max_new:
            return tokens[len(prompt) :]


def _first(num_tokens: int, turning_point: int | None) -> int:
    return int(turning_point is not None and num_tokens > turning_point)


class Recurrent:
    """States in slots: of other bits for a chunk than for single rows, and for other chunks."""

    def __init__(self, num_slots: int) -> None:
        self.slots: list[tuple[int, int]] = [(0, 0)] * num_slots  # value, tokens

    def compute(self, slot: int, tokens: Tokens[int], position: int) -> int:
        value, count = self.slots[slot] if position else (0, 0)
        assert count == position, "a state of other tokens"
        if len(tokens) == 1:
            value = _mix(value, 1, tokens[0])
        else:
            for begin in range(0, len(tokens), BLOCK_TOKENS):
                value = _mix(value, 2, *tokens[begin : begin + BLOCK_TOKENS])
        self.slots[slot] = value, position + len(tokens)
        return value


def recurrent_alone(prompt: Tokens[int], max_new: int) -> list[int]:
    """The naive model of those."""
    states = Recurrent(1)
    value = states.compute(0, prompt, 0)
    new: list[int] = []
    while True:
        new.append(value % NUM_TOKENS)
        if new[-1] == END or len(new) == max_new:
            return new
        value = states.compute(0, new[-1:], len(prompt) + len(new) - 1)


class World:
    """A scheduler, the memory of its pool, and what each sequence has come to."""

    def __init__(self, limits: SchedulerLimits, num_blocks: int) -> None:
        self.limits = limits
        self.pool = BlockPool(num_blocks)
        self.states = Recurrent(limits.max_running) if limits.replays_rows else None
        self.scheduler = Scheduler(limits, self.pool)
        self.cells = [[0] * BLOCK_TOKENS for _ in range(num_blocks)]
        self.sequences: dict[int, Sequence] = {}
        self.cancelled: set[int] = set()
        self.num_steps = 0

    def add(self, sequence: Sequence) -> None:
        self.scheduler.add(sequence)
        self.sequences[sequence.id] = sequence

    def cancel(self, id: int) -> None:  # noqa: A002
        if self.sequences[id].phase is not SequencePhase.FINISHED:
            self.cancelled.add(id)
        self.scheduler.cancel(id)

    def plan(self, ms_per_row: float | None = None) -> StepPlan:
        plan = self.scheduler.plan(ms_per_row)
        for source, target in plan.copies:
            self.cells[target] = [*self.cells[source]]
        self._check_plan(plan)
        self.check_blocks()
        return plan

    def step(self, ms_per_row: float | None = None, cancel_within: int | None = None) -> StepPlan:
        """Plans, computes, chooses, finishes; ``cancel_within`` is cancelled while it computes."""
        self.num_steps += 1
        plan = self.plan(ms_per_row)
        chosen = self.compute(plan)
        if cancel_within is not None:
            self.cancel(cancel_within)
        self.scheduler.done(chosen)
        for id in chosen:  # noqa: A001
            sequence = self.sequences[id]
            if sequence.phase is SequencePhase.FINISHED:
                continue
            if sequence.tokens[-1] == END or sequence.num_new == sequence.max_new_tokens:
                self.scheduler.finish(id)
        self.check_blocks()
        return plan

    def compute(self, plan: StepPlan) -> dict[int, int]:
        choosing = {one.id for one in plan.choosing}
        chosen = {}
        for span in plan.batch.spans if plan.batch else ():
            token = self._compute(span)
            if span.wanted is not Wanted.ALL:
                assert (span.sequence in choosing) == (span.wanted is Wanted.LAST)
            if span.sequence in choosing:
                chosen[span.sequence] = token
        return chosen

    def _compute(self, span: Span) -> int:
        if self.states is not None:
            assert span.state is not None
            return self.states.compute(span.state, span.tokens, span.position) % NUM_TOKENS
        before = [self._cell(span, at) for at in range(span.position)]
        end = span.position + span.num_rows
        value = before[-1] if before else _first(end, self.limits.turning_point)
        for at, token in enumerate(span.tokens, start=span.position):
            value = _mix(value, token)
            self.cells[span.blocks[at // BLOCK_TOKENS]][at % BLOCK_TOKENS] = value
            before.append(value)
        return _mix(7, *before) % NUM_TOKENS

    def _cell(self, span: Span, at: int) -> int:
        return self.cells[span.blocks[at // BLOCK_TOKENS]][at % BLOCK_TOKENS]

    def _check_plan(self, plan: StepPlan) -> None:
        if plan.batch is None:
            # An engine sleeps then, until a request comes.
            assert not self.scheduler.has_work, [*self.sequences.values()]
            return
        spans = plan.batch.spans
        assert self.scheduler.num_running <= self.limits.max_running
        assert len({span.sequence for span in spans}) == len(spans)
        assert all(span.num_rows for span in spans)
        if not self.limits.whole_prompts and self.limits.turning_point is None:
            assert plan.batch.num_rows <= self.limits.max_rows
        if self.limits.max_spans is not None:
            assert len(spans) <= self.limits.max_spans
        prompts = [span for span in spans if span.position < self._prompt_of(span)]
        if self.limits.max_prompts is not None:
            assert len(prompts) <= self.limits.max_prompts
        if not self.limits.mixed:
            assert not prompts or len(prompts) == len(spans)
        for span in spans:
            assert (
                span.tokens
                == self.sequences[span.sequence].tokens[
                    span.position : span.position + span.num_rows
                ]
            )

    def _prompt_of(self, span: Span) -> int:
        return self.sequences[span.sequence].num_prompt

    def check_blocks(self) -> None:
        """Each block is free, or used as often as tables have it; so is each slot."""
        tables = [one.blocks for one in self.sequences.values()]
        users = [0] * self.pool.num_blocks
        for table in tables:
            assert len(set(table)) == len(table)
            for block in table:
                users[block] += 1
        assert users == [self.pool.num_users(block) for block in range(len(users))]
        assert self.pool.num_free == users.count(0)
        for sequence in self.sequences.values():
            for before, name in pairwise(sequence.names):
                if self.pool.find(name) is not None:
                    assert self.pool.find(before) is not None, "a prefix without its beginning"
        taken = [one.state for one in self.sequences.values() if one.state is not None]
        assert len(set(taken)) == len(taken)
        if (slots := self.scheduler._slots) is not None:
            assert len(taken) == self.scheduler.num_running
            assert slots.num_free == self.limits.max_running - len(taken)

    def drain(self, max_steps: int) -> None:
        """Runs until nothing is left; the bound is the test."""
        for _ in range(max_steps):
            if not self.scheduler.has_work:
                return
            self.step()
        assert not self.scheduler.has_work, list(self.sequences.values())

    def text_alone(self, prompt: list[int], max_new: int) -> list[int]:
        """By the naive model of this kind."""
        if self.states is not None:
            return recurrent_alone(prompt, max_new)
        return text_alone(prompt, max_new, self.limits.turning_point)

    def check_texts(self) -> None:
        for sequence in self.sequences.values():
            assert sequence.phase is SequencePhase.FINISHED
            new = sequence.tokens[sequence.num_prompt :]
            prompt = sequence.tokens[: sequence.num_prompt]
            expected = self.text_alone(prompt, sequence.max_new_tokens)
            if sequence.id in self.cancelled:
                assert new == expected[: len(new)]
            else:
                assert new == expected
