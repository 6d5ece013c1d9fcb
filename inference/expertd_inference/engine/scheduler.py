"""What each step computes, and which sequences give way; pure: no tensor, no clock, no thread."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from expertd_inference.engine.acceptance import check_sequence
from expertd_inference.engine.chunks import chunk_end, decodes, span_of
from expertd_inference.engine.limits import SchedulerLimits
from expertd_inference.engine.prefix import Prefixes
from expertd_inference.engine.sequence import Sequence, SequencePhase
from expertd_inference.engine.shared_work import SharedWork
from expertd_inference.engine.waiting import Waiting
from expertd_inference.execution.batch import Batch, Span
from expertd_inference.kv.pool import BLOCK_TOKENS, BlockPool, num_blocks_of
from expertd_inference.kv.state import StateSlots
from expertstore.errors import BusyError

PROMPT_SHARE = 4
"""Of a batch's rows one part of so many is for prompts, if there are any."""


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step. ``sequences`` are those of the batch's spans, in their order.

    ``batch`` is None where there is nothing to compute. ``preempted`` are the ids of sequences
    that gave their blocks back and wait again. Before the step is computed, each first block of
    ``copies`` is to be copied to the second, one pair after the other.
    """

    batch: Batch | None
    sequences: tuple[Sequence, ...]
    preempted: tuple[int, ...]
    copies: tuple[tuple[int, int], ...] = ()

    @property
    def choosing(self) -> tuple[Sequence, ...]:
        """Those whose next token is to be chosen, by the last row that their span wants."""
        spans = () if self.batch is None else self.batch.spans
        return tuple(
            sequence
            for sequence, span in zip(self.sequences, spans, strict=True)
            if span.position + span.num_rows == len(sequence.tokens)
        )


@dataclass(frozen=True, slots=True)
class SchedulerStats:
    """Counts since the start; prefixes in tokens of sequences when these were admitted."""

    num_waiting: int
    num_running: int
    num_preemptions: int
    kv_used: float
    prefix_queries: int
    prefix_hits: int


class Scheduler:
    """Lets sequences wait, run and finish. One thread calls it: plan, compute, done, and again.

    Running sequences decode in each step; what is left of the batch goes to prompts, the first
    that was admitted first. A sequence is admitted once its tokens have blocks, with one left for
    each running sequence; where one needs a block and none is free, the sequence of the highest
    rank gives its own back and is computed again later, mostly from its prefix. The lowest rank
    never gives way, and few sequences ever have a lower rank than one that waits
    (:class:`.Waiting`), so every sequence finishes whatever else comes.
    """

    def __init__(self, limits: SchedulerLimits, pool: BlockPool) -> None:
        self.limits = limits
        self._pool = pool
        self._slots = StateSlots(limits.max_running) if limits.replays_rows else None
        self._prefixes = Prefixes(pool)
        self._work = SharedWork()
        self._waiting = Waiting()
        self._all: dict[int, Sequence] = {}
        self._running: list[Sequence] = []  # in order of admission
        self._served: dict[int, int] = {}  # by the last plan that has it, or before its admission
        self._plan: StepPlan | None = None
        self._num_plans = 0
        self._num_preemptions = 0

    @property
    def num_waiting(self) -> int:
        """Sequences without blocks."""
        return len(self._waiting) + self._work.num_followers

    @property
    def num_running(self) -> int:
        """Sequences with blocks."""
        return len(self._running)

    @property
    def has_work(self) -> bool:
        """Whether any sequence has not finished."""
        return bool(self._all)

    @property
    def shares_prefixes(self) -> bool:
        """Not with recurrent layers, whose state is that of a whole sequence."""
        return self._slots is None

    @property
    def max_tokens(self) -> int:
        """Of a sequence: what the context and the whole pool take."""
        pool = self._pool.num_blocks * BLOCK_TOKENS
        return min(pool, self.limits.context_tokens or pool)

    @property
    def stats(self) -> SchedulerStats:
        """As of now."""
        return SchedulerStats(
            num_waiting=self.num_waiting,
            num_running=self.num_running,
            num_preemptions=self._num_preemptions,
            kv_used=1 - self._pool.num_free / self._pool.num_blocks,
            prefix_queries=self._prefixes.num_queried,
            prefix_hits=self._prefixes.num_hit,
        )

    def add(self, sequence: Sequence) -> None:
        """Lets a new sequence wait, and cuts its ``max_new_tokens`` to the room that there is.

        Raises InvalidInputError for a prompt without tokens or a token that the model does not
        have, PromptTooLongError if nothing could follow the prompt, and BusyError if too many
        wait.
        """
        check_sequence(sequence, self.limits, self.max_tokens)
        self._check_queue(sequence.user)
        room = self.max_tokens - sequence.num_prompt
        sequence.max_new_tokens = min(sequence.max_new_tokens, room)
        if self._is_past_point(sequence):
            sequence.become_long()
        self._all[sequence.id] = sequence
        self._waiting.arrive(sequence)
        self._waiting.add(sequence)

    def cancel(self, id: int) -> None:  # noqa: A002
        """Ends a sequence wherever it is; harmless for one that has finished or never was.

        A step may compute it just now: its blocks are not given to another before the next plan.
        """
        sequence = self._all.pop(id, None)
        if sequence is None:
            return
        was_running = sequence.phase is SequencePhase.RUNNING
        sequence.phase = SequencePhase.FINISHED
        self._waiting.leave(sequence.user)
        self._served.pop(id, None)
        if was_running:
            self._running.remove(sequence)
            self._release(sequence)
        if not self._work.forget(sequence) and not was_running:
            self._waiting.remove(sequence)

    finish = cancel
    """Ends a sequence that is complete."""

    def plan(self, ms_per_row: float | None = None) -> StepPlan:
        """The next step; a plan before it that was not done is forgotten: none of it counts.

        Not if an executor completed the step: it has moved the recurrent states on.
        ``ms_per_row`` is what a row of a prompt was measured to take.
        """
        self._num_plans += 1
        self._turn_long()
        copies = self._admit()
        preempted: list[int] = []
        spans = self._spans(ms_per_row, preempted)
        num_preempted = 0
        while not spans and len(preempted) > num_preempted:
            # All of this turn gave way, and those with their blocks are still to be asked.
            num_preempted = len(preempted)
            spans = self._spans(ms_per_row, preempted)
        sequences = tuple(self._all[span.sequence] for span in spans)
        for sequence in sequences:
            self._served[sequence.id] = self._num_plans
        batch = Batch(tuple(spans)) if spans else None
        self._plan = StepPlan(batch, sequences, tuple(preempted), tuple(copies))
        return self._plan

    def done(self, chosen: Mapping[int, int]) -> None:
        """The step that was planned last is computed; ``chosen`` has the next token by sequence.

        A sequence that chooses none must finish before the next plan.
        """
        plan, self._plan = self._plan, None
        if plan is None or plan.batch is None:
            return
        for sequence, span in zip(plan.sequences, plan.batch.spans, strict=True):
            if sequence.phase is SequencePhase.FINISHED:
                continue
            before = sequence.num_computed
            sequence.num_computed += span.num_rows
            self._waiting.charge(sequence.user, span.num_rows)
            if self.shares_prefixes:
                self._wait_again(self._work.computed(self._prefixes.keep(sequence, before)))
            if sequence.id in chosen:
                sequence.append(chosen[sequence.id])

    def _check_queue(self, user: str) -> None:
        if self.num_waiting >= self.limits.max_waiting:
            raise BusyError(
                f"{self.num_waiting} sequences wait already, the most that may "
                "(max_waiting); retry later."
            )
        most = self.limits.max_waiting_per_user
        if most is None:
            return
        waiting = sum(
            one.user == user and one.phase is SequencePhase.WAITING for one in self._all.values()
        )
        if waiting >= most:
            raise BusyError(
                f"{waiting} sequences of this user wait already, the most that may "
                "(max_waiting_per_user); retry later."
            )

    def _is_past_point(self, sequence: Sequence) -> bool:
        point = self.limits.turning_point
        return point is not None and len(sequence.tokens) > point

    def _turn_long(self) -> None:
        """Those that have just become too long for their keys begin anew."""
        for sequence in [*self._running]:
            if not sequence.is_long and self._is_past_point(sequence):
                self._give_way(sequence)
                sequence.become_long()

    def _admit(self) -> list[tuple[int, int]]:
        """Lets sequences run; which blocks are to be copied for them."""
        copies: list[tuple[int, int]] = []
        while len(self._running) < self.limits.max_running:
            sequence = self._waiting.next()
            if sequence is None:
                break
            found: list[int] = []
            names: list[bytes] = []
            beginning: tuple[int, int] | None = None
            if self.shares_prefixes:
                found = self._prefixes.find(sequence) if sequence.may_use_prefix else []
                names = self._prefixes.names(sequence)[len(found) :]
                shared = names if len(sequence.tokens) % BLOCK_TOKENS else names[:-1]
                if sequence.may_use_prefix and self._work.follow(sequence, shared):
                    self._waiting.remove(sequence)
                    continue
                if sequence.may_use_prefix:
                    beginning = self._prefixes.find_beginning(sequence, len(found))
            if not self._give_blocks(sequence, found):
                break
            self._waiting.remove(sequence)
            self._waiting.count_admission()
            self._work.promise(sequence.id, names)
            sequence.phase = SequencePhase.RUNNING
            sequence.num_computed = len(found) * BLOCK_TOKENS
            if beginning is not None:
                block, num_tokens = beginning
                copies.append((block, sequence.blocks[len(found)]))
                sequence.num_computed += num_tokens
            sequence.num_from_prefix = sequence.num_computed
            self._prefixes.count(sequence)
            self._running.append(sequence)
            # Else those that come would go before those that run, for as long as some come.
            self._served[sequence.id] = self._num_plans - 1
        return copies

    def _give_blocks(self, sequence: Sequence, found: list[int]) -> bool:
        """Blocks for all its tokens, and a slot if need be; or nothing, if blocks are too few."""
        num_new = num_blocks_of(len(sequence.tokens)) - len(found)
        reserve = len(self._running)
        self._pool.retain(found)
        blocks = None
        if num_new + reserve <= self._pool.num_free:
            blocks = self._pool.allocate(num_new)
        if blocks is None:
            self._pool.release(found)
            return False
        sequence.blocks = found + blocks
        if self._slots is not None:
            sequence.state = self._slots.take()
        return True

    def _spans(self, ms_per_row: float | None, preempted: list[int]) -> list[Span]:
        """Those of the running sequences whose turn it is."""
        turn = self._turn()
        decoding = [one for one in turn if self._decodes(one)]
        prompts = [one for one in turn if not self._decodes(one)]
        if not self.limits.mixed and decoding and prompts:
            # Whoever waited longest says which: so they take turns.
            first = min(turn, key=self._last_served)
            decoding, prompts = (decoding, []) if self._decodes(first) else ([], prompts)
        spans = self._decode(decoding, bool(prompts), preempted)
        pauses = any(self._decodes(one) for one in self._running)
        limit = max(0, self.limits.max_rows - len(spans))
        if pauses and ms_per_row:
            paused = int(self.limits.pause_ms / ms_per_row) - len(spans)
            limit = min(limit, max(paused, BLOCK_TOKENS))
        return spans + self._prompt_chunks(prompts, limit)

    def _decodes(self, sequence: Sequence) -> bool:
        return decodes(sequence, self.limits)

    def _last_served(self, sequence: Sequence) -> int:
        return self._served[sequence.id]

    def _turn(self) -> list[Sequence]:
        """The running sequences that may be in this batch, in order of rank."""
        turn = [one for one in self._running if one.num_missing]
        if self.limits.max_spans is not None and len(turn) > self.limits.max_spans:
            turn = sorted(turn, key=self._last_served)[: self.limits.max_spans]
        return sorted(turn, key=lambda one: one.rank)

    def _decode(
        self, decoding: list[Sequence], prompts_wait: bool, preempted: list[int]
    ) -> list[Span]:
        """A row of each; preempts where one needs a block and none is free."""
        most = self.limits.max_rows
        if prompts_wait:
            most = max(1, most - most // PROMPT_SHARE)
        if len(decoding) > most:
            decoding = sorted(decoding, key=self._last_served)[:most]
            decoding.sort(key=lambda one: one.rank)
        # Only a higher rank gives way, so none that has its span already.
        return [
            span_of(sequence, sequence.num_computed + 1)
            for sequence in decoding
            if sequence.phase is SequencePhase.RUNNING and self._grow(sequence, preempted)
        ]

    def _grow(self, sequence: Sequence, preempted: list[int]) -> bool:
        """Gives it a block if it needs one; False if it had to give way itself."""
        while num_blocks_of(sequence.num_computed + 1) > len(sequence.blocks):
            blocks = self._pool.allocate(1)
            if blocks is not None:
                sequence.blocks += blocks
                continue
            victim = max(self._running, key=lambda one: one.rank)
            self._give_way(victim)
            self._num_preemptions += 1
            preempted.append(victim.id)
            if victim is sequence:
                return False
        return True

    def _give_way(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self._release(sequence)
        sequence.phase = SequencePhase.WAITING
        self._waiting.add_preempted(sequence)

    def _prompt_chunks(self, prompts: list[Sequence], limit: int) -> list[Span]:
        """Chunks of prompts, of ``limit`` rows in all."""
        spans: list[Span] = []
        for sequence in prompts:
            if len(spans) == self.limits.max_prompts:
                break
            if sequence.phase is not SequencePhase.RUNNING:
                continue  # it has just given way
            end = chunk_end(sequence, self.limits, limit, first=not spans)
            if end == sequence.num_computed:
                break
            limit = max(0, limit - (end - sequence.num_computed))
            spans.append(span_of(sequence, end))
        return spans

    def _release(self, sequence: Sequence) -> None:
        if self.shares_prefixes:
            self._prefixes.leave(sequence)
        self._pool.release(sequence.blocks)
        sequence.blocks = []
        if self._slots is not None and sequence.state is not None:
            self._slots.give_back(sequence.state)
            sequence.state = None
        self._wait_again(self._work.withdraw(sequence.id))

    def _wait_again(self, sequences: Iterable[Sequence]) -> None:
        for sequence in sequences:
            self._waiting.add(sequence)
