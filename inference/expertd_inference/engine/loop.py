"""The engine's step: schedule, compute, sample, deliver."""

import threading
import time
from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from expertd_inference.device.transaction import StepLostError
from expertd_inference.engine.live import Live
from expertd_inference.engine.matcher import follow
from expertd_inference.engine.pace import Pace
from expertd_inference.engine.sampling import Chosen, choose, prompt_logprobs
from expertd_inference.engine.scheduler import Scheduler, SchedulerStats, StepPlan
from expertd_inference.engine.sequence import Sequence
from expertd_inference.engine.token import Opening, Token
from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.executor import Executor
from expertd_inference.experts.recovery import SESSION_ENDED
from expertd_inference.process.reasons import reason_of
from expertstore.errors import (
    DeviceLostError,
    ExpertdError,
    NotFoundError,
    PreconditionError,
    SequenceFailedError,
    StepFailedError,
)

STORE_GONE = (*SESSION_ENDED, NotFoundError, PreconditionError, DeviceLostError)
"""Errors of a step that the next step would meet as well: they end all sequences."""

Result = TypeVar("Result")
Choices = dict[int, Chosen | ExpertdError]
"""The next token of each sequence that chooses one, by its id; or why it has none."""


class Loop:
    """Computes the sequences of one executor, a step at a time.

    :meth:`step`, :meth:`cancel` and :meth:`end_all` are for the engine's thread, the rest is for
    any.
    """

    def __init__(self, executor: Executor, scheduler: Scheduler) -> None:
        self._executor = executor
        self._scheduler = scheduler
        self._live: dict[int, Live] = {}
        self._pace = Pace()
        # The scheduler is for one thread at a time, and sequences are added by clients' threads.
        self._lock = threading.Lock()
        self.num_steps = 0
        self.num_rows = 0

    def __repr__(self) -> str:
        return f"<Loop of {len(self._live)} sequences after {self.num_steps} steps>"

    @property
    def scheduler_stats(self) -> SchedulerStats:
        """Its counts, as of now."""
        with self._lock:
            return self._scheduler.stats

    def add(self, sequence: Sequence, live: Callable[[], Live]) -> Live:
        """Takes on a sequence; ``live`` is asked once the scheduler has accepted it.

        Raises as :meth:`Scheduler.add` and ``live`` do; then there is no such sequence.
        """
        with self._lock:
            self._scheduler.add(sequence)
            try:
                self._live[sequence.id] = made = live()
            except BaseException:
                self._scheduler.cancel(sequence.id)
                raise
            return made

    def cancel(self, sequence: int) -> None:
        """Forgets a sequence; harmless for one that is complete or never was."""
        if live := self._live.get(sequence):
            self._end([live])

    def end_all(self, error: BaseException) -> None:
        """Ends all sequences with ``error``."""
        with self._lock:
            lives = [*self._live.values()]
        self._end(lives, error)

    def step(self) -> bool:
        """Computes a batch and delivers what comes of it; False if there is nothing to compute."""
        plan = self._schedule()
        if plan.batch is None:
            return False
        self._note_begun(plan)
        try:
            # Once: a block may be the target of one copy after it was the source of another.
            for source, target in plan.copies:
                _until_kept(partial(self._executor.copy_block, source, target))
        except Exception as error:
            self.end_all(error if isinstance(error, ExpertdError) else _unforeseen(error))
            return True
        try:
            chosen = self._computed(plan)
        except Exception as error:
            self._fail(plan, error)
        else:
            self._deliver(chosen)
        return True

    def _computed(self, plan: StepPlan) -> Choices:
        assert plan.batch is not None
        return self._sample(plan, self._forward(plan.batch))

    def _schedule(self) -> StepPlan:
        with self._lock:
            return self._scheduler.plan(self._pace.ms_per_row)

    def _note_begun(self, plan: StepPlan) -> None:
        now = time.monotonic()
        for sequence in plan.sequences:
            live = self._live[sequence.id]
            live.begun = live.begun or now

    def _forward(self, batch: Batch) -> Tensor:  # [batch.num_wanted, vocabulary]
        began = time.perf_counter()
        if self._executor.fits(batch):
            logits = self._repeated(batch)
        else:
            logits = torch.cat([self._repeated(Batch((span,))) for span in batch.spans])
        self._pace.took(1e3 * (time.perf_counter() - began), batch)
        self.num_steps += 1
        self.num_rows += batch.num_rows
        return logits

    def _repeated(self, batch: Batch) -> Tensor:
        return _until_kept(partial(self._executor.forward, batch))

    def _sample(self, plan: StepPlan, logits: Tensor) -> Choices:
        lives = [self._live[sequence.id] for sequence in plan.choosing]
        chosen = choose(
            self._rows_that_choose(plan, logits),
            [live.sampler for live in lives],
            [live.sequence.tokens for live in lives],
        )
        return {live.sequence.id: new for live, new in zip(lives, chosen, strict=True)}

    def _rows_that_choose(self, plan: StepPlan, logits: Tensor) -> Tensor:
        """[sequences that choose, vocabulary]; the others are noted as those of prompts."""
        choosing = {sequence.id for sequence in plan.choosing}
        rows = []
        end = 0
        assert plan.batch is not None
        for span in plan.batch.spans:
            begin, end = end, end + span.num_wanted
            if span.wanted is Wanted.ALL:
                _note_prompt(self._live[span.sequence], span, logits[begin:end])
            if span.sequence in choosing:
                rows.append(end - 1)
        return logits if len(rows) == len(logits) else logits[rows]

    def _deliver(self, chosen: Choices) -> None:
        follow(
            [
                (matcher, new.token)
                for id_, new in chosen.items()
                if isinstance(new, Chosen)
                and (matcher := self._live[id_].sampler.matcher) is not None
            ]
        )
        tokens = {id_: new.token for id_, new in chosen.items() if isinstance(new, Chosen)}
        with self._lock:
            self._scheduler.done(tokens)
        for id_, new in chosen.items():
            live = self._live[id_]
            if not isinstance(new, Chosen):
                self._end([live], new)
                continue
            try:
                token = _token(live, new)
            except Exception as error:
                self._end([live], _of_one(error))
                continue
            live.outlet.send([token])
            if token.finish_reason is not None:
                self._end([live])

    def _fail(self, plan: StepPlan, error: Exception) -> None:
        """Ends the sequences that a step fails with: those that fail when computed alone.

        Recurrent states may have gone on already, so that there it ends all of the step.
        """
        chosen: Choices = {}
        errors = {sequence.id: error for sequence in plan.sequences}
        tries = len(errors) > 1 and not self._executor.recurrent
        if tries and not isinstance(error, STORE_GONE):
            assert plan.batch is not None
            for sequence, span in zip(plan.sequences, plan.batch.spans, strict=True):
                try:
                    chosen |= self._computed(StepPlan(Batch((span,)), (sequence,), ()))
                except Exception as own:
                    errors[sequence.id] = error = own
                    if isinstance(own, STORE_GONE):
                        break
                else:
                    del errors[sequence.id]
        if isinstance(error, STORE_GONE):
            self.end_all(error)
            return
        put = _unforeseen if len(errors) == len(plan.sequences) else _of_one
        for id_, why in errors.items():
            self._end([self._live[id_]], why if isinstance(why, ExpertdError) else put(why))
        self._deliver(chosen)

    def _end(self, lives: Iterable[Live], error: BaseException | None = None) -> None:
        for live in lives:
            with self._lock:
                self._scheduler.finish(live.sequence.id)
                del self._live[live.sequence.id]
            live.outlet.end(error)


def _until_kept(step: Callable[[], Result]) -> Result:
    """Computes a step, or a part of one, again for as long as it is lost."""
    while True:
        try:
            return step()
        except StepLostError:
            # A step changes nothing but what it appends, and the next one overwrites that.
            continue


def _token(live: Live, new: Chosen) -> Token:
    matcher = live.sampler.matcher
    piece = live.text.feed(new.token, ends=matcher is not None and matcher.has_ended)
    opening = None
    if not live.has_opened:
        live.has_opened = True
        asked = live.sequence.settings.prompt_logprobs is not None
        opening = Opening(
            live.sequence.num_from_prefix,
            (live.begun or live.added) - live.added,
            tuple(live.prompt_logprobs) if asked else None,
            0 if live.sequence.seen is None else live.sequence.seen.num_more,
        )
    return Token(
        new.token,
        piece.text,
        new.logprob,
        new.top_logprobs,
        piece.finish_reason,
        opening,
        piece.stop,
    )


def _note_prompt(live: Live, span: Span, logits: Tensor) -> None:
    """``logits`` [span.num_rows, vocabulary] say how likely the prompt's next tokens were."""
    sequence = live.sequence
    # A sequence that was preempted in its prompt computes the first rows again.
    known = len(live.prompt_logprobs) - span.position
    if known < 0 or sequence.settings.prompt_logprobs is None:
        return
    targets = sequence.tokens[span.position + 1 + known : sequence.num_prompt][
        : max(0, span.num_rows - known)
    ]
    live.prompt_logprobs.extend(
        prompt_logprobs(
            logits[known : known + len(targets)], targets, sequence.settings.prompt_logprobs
        )
    )


def _unforeseen(error: Exception) -> StepFailedError:
    failed = StepFailedError(
        f"A step of the engine failed ({reason_of(error)}), and with it the sequences that it "
        "computed; this is a fault of expertd or of what it runs on: please report it."
    )
    failed.__cause__ = error
    return failed


def _of_one(error: Exception) -> SequenceFailedError:
    failed = SequenceFailedError(
        f"This sequence could not be computed ({reason_of(error)}), while others can; this is a "
        "fault of expertd or of the model's files: please report it."
    )
    failed.__cause__ = error
    return failed
