"""Many sequences of one model, computed together: the face of the engine.

::

    from expertd_inference import Engine, GenerationSettings, Worker

    with Engine(worker) as engine:
        for done in engine.generate(prompts, GenerationSettings(max_new_tokens=32)):
            print(done.text, done.finish_reason)

One thread plans a batch, computes it, samples and delivers; :meth:`Engine.submit` never waits for
it.
"""

import atexit
import itertools
import operator
import os
import reprlib
import threading
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from queue import Empty, SimpleQueue
from typing import Any, TypeGuard, cast

import torch

from expertd_inference.engine.acceptance import check_experts
from expertd_inference.engine.budget import EngineLimits, budget_for, scheduler_limits
from expertd_inference.engine.channel import Channel, Outlet
from expertd_inference.engine.completion import Completion, complete_all
from expertd_inference.engine.live import live_of
from expertd_inference.engine.loop import Loop
from expertd_inference.engine.matcher import Grammars
from expertd_inference.engine.sampling import Sampling
from expertd_inference.engine.scheduler import Scheduler
from expertd_inference.engine.sequence import ORIGIN, Origin
from expertd_inference.engine.sequence import Sequence as LiveSequence
from expertd_inference.engine.served import Served
from expertd_inference.engine.stats import EngineStats
from expertd_inference.engine.stream import TokenStream
from expertd_inference.engine.token import Token
from expertd_inference.engine.wishes import Wishes, resolve
from expertd_inference.execution.executor import Executor
from expertd_inference.execution.room import Room
from expertd_inference.kv.pool import BLOCK_TOKENS, BlockPool
from expertd_inference.model.seen import Seen
from expertd_inference.settings import GenerationSettings
from expertstore.closing import Closing
from expertstore.errors import InvalidInputError, PreconditionError

Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]
"""A text, token ids, or the messages of a chat."""


class Engine(Closing):
    """Computes many sequences of ``worker``'s model at a time, until :meth:`close`.

    It is safe to use from several threads, and from an event loop. A sequence's tokens depend on
    its prompt, settings and seed; what else is computed changes them only as far as rounding
    depends on the number of rows, and with ``Worker(exact=True)`` not at all.

    An error of a step ends those of its sequences that also fail when they are computed alone (all
    of them, if the model is recurrent), and all sequences where the next step would meet it as well
    (the daemon is gone for longer than the worker waits, the model was unloaded): their streams
    raise it. The engine can be used again then: once the daemon is back, new sequences are
    computed. The worker's ``close`` closes the engine, too.
    """

    def __init__(
        self,
        worker: Served,
        limits: EngineLimits | None = None,
        after_step: Callable[[], None] = lambda: None,
    ) -> None:
        """Takes memory for keys and values, and starts the thread.

        ``after_step`` is called by that thread once outlets have what came of a step. Raises
        InvalidInputError if there is no memory for one sequence or for a step of so many rows, or
        if it is to keep more experts than routers choose, and what the worker's executor raises.
        """
        self._worker = worker
        self._limits = limits or EngineLimits()
        self._after_step = after_step
        check_experts(self._limits.experts_per_token, worker.experts_per_token)
        self._budget = budget_for(self._limits, worker)
        room = self._budget.room
        self._executor = _opened(worker, room)
        self._loop = Loop(
            self._executor,
            Scheduler(
                scheduler_limits(self._limits, room, self._executor, worker),
                BlockPool(room.num_blocks),
            ),
        )
        self._grammars = Grammars(worker)
        self._ids = itertools.count()
        # Orders to the thread: a sequence to cancel, or None to look again. It may be put to in
        # the midst of anything, a garbage collection included, which takes no lock twice.
        self._orders: SimpleQueue[int | None] = SimpleQueue()
        self._closed = False
        self._computing = False
        """Whether the last step had something to compute, so that there may be a next one."""
        self._process = os.getpid()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()
        self._forget = worker.before_close(self.close)
        # A thread that computes while Python ends may crash it.
        atexit.register(self.close)

    def __repr__(self) -> str:
        state = "closed" if self._closed else "open"
        return f"<Engine {self._executor.name} {state}: {self._loop!r}>"

    @property
    def executor(self) -> str:
        """What computes the steps: ``program``, ``graphs``, ``modules`` or ``turns``."""
        return self._executor.name

    @property
    def closed(self) -> bool:
        """Whether it computes no more: :meth:`close` was called, or its thread met a fault."""
        return self._closed

    @property
    def reason(self) -> str:
        """Why that one."""
        return self._executor.reason

    @property
    def limits(self) -> EngineLimits:
        """As it was made with."""
        return self._limits

    @property
    def stats(self) -> EngineStats:
        """What was done until now."""
        loop, scheduler = self._loop, self._loop.scheduler_stats
        return EngineStats(
            executor=self.executor,
            reason=self.reason,
            num_steps=loop.num_steps,
            num_rows=loop.num_rows,
            rows_mean=loop.num_rows / loop.num_steps if loop.num_steps else 0.0,
            num_running=scheduler.num_running,
            num_waiting=scheduler.num_waiting,
            prefix_queries=scheduler.prefix_queries,
            prefix_hits=scheduler.prefix_hits,
            num_preemptions=scheduler.num_preemptions,
            kv_tokens=self._budget.room.num_blocks * BLOCK_TOKENS,
            kv_why=self._budget.why,
            kv_used=scheduler.kv_used,
            native_rows=self._worker.native_rows,
            experts_mean=self._experts_mean(),
        )

    def _experts_mean(self) -> float:
        """Of the experts that computed a row of a MoE layer."""
        tally, choices = self._executor.tally, self._worker.experts_per_token
        num_rows = self._loop.num_rows * len(choices)
        if not num_rows:
            return 0.0
        # Rows of the other steps had all that routers choose.
        others = max(0, num_rows - tally.num_rows) / len(choices) * sum(choices)
        return (tally.num_experts + others) / max(num_rows, tally.num_rows)

    def encode(self, prompt: Prompt) -> Sequence[int]:
        """The tokens of a prompt, as :meth:`submit` takes it. Raises as that."""
        if isinstance(prompt, str) or _is_chat(prompt):
            return self._worker.encode(prompt)
        return _token_ids(cast("Sequence[int]", prompt))

    def submit(
        self,
        prompt: Prompt,
        settings: GenerationSettings | None = None,
        *,
        images: Sequence[bytes] = (),
    ) -> TokenStream:
        """Begins to continue ``prompt``: a text, token ids, or a chat's messages.

        Returns at once, or once the vision part has looked at ``images``, the bytes of files, for
        each of which the prompt has one image token; the stream has the tokens as they come.
        Messages (``role`` and ``content``) are put in the model's chat template. Raises
        InvalidInputError for a prompt that is empty or has tokens that the model has not,
        PromptTooLongError for one that leaves no room in the model's context or in the memory for
        keys and values, or for a grammar that cannot be used, BusyError if ``max_waiting``
        sequences wait already, and PreconditionError after :meth:`close`, in a fork of the process,
        and for a grammar without llguidance.
        """
        if settings is None:
            settings = GenerationSettings()
        elif not isinstance(settings, GenerationSettings):
            raise InvalidInputError(
                f"The settings are of type {type(settings).__name__}; give GenerationSettings."
            )
        tokens = self.encode(prompt)
        tokens, seen = self._worker.see(tokens, images) if images else (tokens, None)
        wishes = resolve(settings, self._worker, tokens)
        return self.begin(
            tokens, settings, wishes.sampling, wishes.end_tokens, wishes.stop, seen=seen
        )

    def generate(
        self, prompts: Sequence[Prompt], settings: GenerationSettings | None = None
    ) -> list[Completion]:
        """Continues all ``prompts`` by the same settings, and waits for them.

        What becomes of each, in their order; there may be more than :meth:`submit` would let
        wait. Raises as that, and what ends a sequence: then the others are cancelled.
        """
        return complete_all(lambda prompt: self.submit(prompt, settings), prompts)

    def begin(
        self,
        tokens: Sequence[int],
        settings: GenerationSettings,
        sampling: Sampling,
        end_tokens: frozenset[int],
        stop: tuple[str, ...] = (),
        *,
        seen: Seen | None = None,
    ) -> TokenStream:
        """As :meth:`submit`, where the caller says how tokens are chosen and what ends the text."""
        channel: Channel[Token] = Channel()
        wishes = Wishes(sampling, end_tokens, stop)
        cancel = self._begin(channel, tokens, settings, wishes, ORIGIN, seen)
        return TokenStream(channel, cancel, num_prompt_tokens=len(tokens))

    def relay(
        self,
        outlet: Outlet[Token],
        tokens: Sequence[int],
        settings: GenerationSettings,
        origin: Origin = ORIGIN,
        images: Sequence[bytes] = (),
    ) -> Callable[[], None]:
        """As :meth:`submit`, for tokens that go on to another process: ``outlet`` gets them.

        Returns what cancels the sequence, safe to call at any time. Raises as :meth:`submit`.
        """
        tokens, seen = self._worker.see(tokens, images) if images else (tokens, None)
        wishes = resolve(settings, self._worker, tokens)
        return self._begin(outlet, tokens, settings, wishes, origin, seen)

    def cancel(self, stream: TokenStream) -> None:
        """As :meth:`TokenStream.cancel`."""
        stream.cancel()

    def close(self) -> None:
        """Ends the thread after its step, and all sequences with PreconditionError.

        Gives the memory for keys and values back. A second call does nothing.
        """
        self._closed = True
        self._orders.put(None)
        self._thread.join()
        self._forget()
        atexit.unregister(self.close)

    def _begin(
        self,
        outlet: Outlet[Token],
        tokens: Sequence[int],
        settings: GenerationSettings,
        wishes: Wishes,
        origin: Origin,
        seen: Seen | None,
    ) -> Callable[[], None]:
        self._check_usable()
        settings = self._with_experts(settings)
        matcher = None
        if settings.grammar is not None:
            matcher = self._grammars.matcher(settings.grammar, wishes.end_tokens, origin.generated)
        adapter = None
        if settings.adapter is not None:
            adapter = self._worker.adapters.open(settings.adapter)
        self._worker.expect(tokens)
        sequence = LiveSequence(next(self._ids), tokens, settings, origin, seen, adapter)
        self._loop.add(
            sequence,
            lambda: live_of(
                sequence,
                outlet,
                self._worker.tokenizer,
                wishes.sampling,
                wishes.end_tokens,
                wishes.stop,
                matcher,
            ),
        )
        self._orders.put(None)
        if self._closed:
            # It was closed meanwhile, and the thread may not have seen the sequence.
            outlet.end(_closed())
        return partial(self._orders.put, sequence.id)

    def _with_experts(self, settings: GenerationSettings) -> GenerationSettings:
        """With what the limits say where these say nothing; None is all that routers choose."""
        num, share = settings.experts_per_token, settings.expert_threshold
        if num is None:
            num = self._limits.experts_per_token
        if share is None:
            share = self._limits.expert_threshold
        if num == max(self._worker.experts_per_token, default=None):
            num = None
        if (num, share) == (settings.experts_per_token, settings.expert_threshold):
            return settings
        return replace(settings, experts_per_token=num, expert_threshold=share)

    def _run(self) -> None:
        error: BaseException = _closed()
        try:
            with torch.no_grad():
                while self._take_orders():
                    self._computing = self._loop.step()
                    self._after_step()
        except BaseException as fault:
            # A fault of the engine itself: nothing that it holds is to be believed.
            error = fault
            raise
        finally:
            self._closed = True
            self._loop.end_all(error)
            self._after_step()
            self._grammars.close()
            self._executor.close()

    def _take_orders(self) -> bool:
        """Follows the orders that came, waiting for one if there is nothing to compute.

        False once the engine is to end.
        """
        with suppress(Empty):
            while not self._closed:
                order = self._orders.get(block=not self._computing)
                self._computing = True
                if order is not None:
                    self._loop.cancel(order)
        return not self._closed

    def _check_usable(self) -> None:
        if os.getpid() != self._process:
            raise PreconditionError(
                f"This model was loaded by process {self._process}, of which this one is a fork; "
                "start workers with multiprocessing's spawn method, and load the model in each."
            )
        if self._closed:
            raise _closed()


def _opened(worker: Served, room: Room) -> Executor:
    try:
        return worker.open_executor(room)
    except RuntimeError as error:
        if "can't allocate memory" not in str(error):  # torch's words, in an error of no own type
            raise
        raise InvalidInputError(
            f"There is no memory for steps of {room.num_rows} rows and {room.num_sequences} "
            "sequences; ask for fewer (max_sequences, chunk_rows)."
        ) from error


def _is_chat(
    prompt: Sequence[int] | Sequence[Mapping[str, Any]],
) -> TypeGuard[Sequence[Mapping[str, Any]]]:
    return isinstance(prompt, Sequence) and len(prompt) > 0 and isinstance(prompt[0], Mapping)


def _token_ids(prompt: Sequence[int]) -> list[int]:
    try:
        if isinstance(prompt, bytes | bytearray):
            raise TypeError
        return [operator.index(token) for token in prompt]
    except TypeError:
        raise InvalidInputError(
            "A prompt is a text, a list of token ids, or a list of a chat's messages; this one is "
            f"{reprlib.repr(prompt)} ({type(prompt).__name__})."
        ) from None


def _closed() -> PreconditionError:
    return PreconditionError("The engine was closed; make another.")
