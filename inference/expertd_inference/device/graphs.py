"""Decoding by replay: a step of one token recorded once, as CUDA graphs, and repeated.

transformers' static cache keeps positions and lengths on the device, so a recorded forward pass
advances by itself: all that a step is given is the token. Two ways:

- *segments*: the recording is cut where the model calls its experts. Between two segments the
  host reads the routing and lets the experts be computed as always. No modelling code is copied:
  the cut is made by the experts function itself, in the midst of one ordinary forward pass.
- *whole*: the device finds and copies experts by itself (:mod:`.gpu_driven`), the step is one
  recording, and the host looks once, at its end, whether an expert was not in RAM. Then the
  daemon brings it, and the step is repeated: what it wrote to the cache is written again.

Prompts, batches and whatever else is not one more token of one sequence run as always.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import StaticCache
from transformers.cache_utils import StaticLayer
from transformers.modeling_outputs import CausalLMOutputWithPast

from expertd_inference.device.recorder import Recorder, Recording
from expertd_inference.experts.call import ExpertsCall, ExpertsRunner, seat_of
from expertd_inference.settings import DecodeGraphsMode
from expertstore.errors import PreconditionError


class DecodeCache(StaticCache):  # type: ignore[misc] # transformers is untyped
    """A static cache whose every layer has full length, since others count in Python.

    Sliding windows are then a matter of the mask. ``num_tokens`` counts what forward passes have
    written: a pass whose end fails is counted too, and undone by :meth:`rewind`.
    """

    def __init__(self, config: Any, max_tokens: int) -> None:  # noqa: ANN401
        super().__init__(config, max_cache_len=max_tokens)
        self.layers: list[Any] = [StaticLayer(max_cache_len=max_tokens) for _ in range(len(self))]
        self.max_tokens = max_tokens
        self.num_tokens = 0

    def reset(self) -> None:
        """Empties it; what was recorded with it is still good."""
        super().reset()
        self.num_tokens = 0

    def rewind(self, num_tokens: int | None = None) -> None:
        """Goes back to ``num_tokens``, or to those counted; later ones will be written again."""
        if num_tokens is not None:
            self.num_tokens = num_tokens
        for layer in self.layers:
            if layer.is_initialized:
                layer.cumulative_length.fill_(self.num_tokens)


def room_for(num_tokens: int) -> int:
    """What a cache for so many tokens is made for: one of few lengths, a quarter longer at most.

    Few, so that the next sequence can often be replayed with what the last one recorded; below 1024
    they are multiples of 256. And by the number alone, since attention over another length may
    round otherwise.
    """
    step = max(256, 1 << (num_tokens - 1).bit_length() >> 3)
    return -(-num_tokens // step) * step


class Steps(Protocol):
    """One way to run steps of one token."""

    @property
    def mode(self) -> DecodeGraphsMode:
        """SEGMENTS or WHOLE."""

    @property
    def valid(self) -> bool:
        """Whether what was recorded may still be replayed."""

    def run(self, call: ExpertsCall, /) -> Tensor:
        """A layer's experts, while a step of ours runs, as an ``ExpertsRunner`` does."""

    def first(self, forward: Callable[[], Tensor]) -> Tensor:
        """A step that is not recorded: what has to be compiled or allocated once is, by it."""

    def record(self, forward: Callable[[], Tensor]) -> Tensor:
        """A step that is also recorded; the logits, at an address that stays."""

    def replay(self) -> None:
        """A step."""


@dataclass(frozen=True)
class _Stop:
    """Where a recording is cut: what came before, and the experts to be computed there."""

    before: Recording
    compute: Callable[[], None]


class SegmentSteps:
    """The trunk recorded, the experts between: ``runners`` by layer."""

    def __init__(self, recorder: Recorder, runners: Mapping[int, ExpertsRunner]) -> None:
        self._recorder = recorder
        self._runners = runners
        self._stops: list[_Stop] = []
        self._last: Recording | None = None
        self._recording = False

    @property
    def mode(self) -> DecodeGraphsMode:
        """Segments."""
        return DecodeGraphsMode.SEGMENTS

    @property
    def valid(self) -> bool:
        """Always: the experts are not part of it."""
        return True

    def run(self, call: ExpertsCall, /) -> Tensor:
        """Cuts the recording, and computes; the recording's next segment reads the result."""
        runner = self._runners[call.layer]
        if not self._recording:
            return runner.run(call)
        before = self._recorder.end()
        # Outside of the recordings' memory: theirs may be used again by later segments.
        output = torch.empty_like(call.routed.rows)

        def compute() -> None:
            output.copy_(runner.run(call))

        self._stops.append(_Stop(before, compute))
        before.replay()
        compute()
        self._recorder.begin()
        return output

    def first(self, forward: Callable[[], Tensor]) -> Tensor:
        """As it is."""
        return forward()

    def record(self, forward: Callable[[], Tensor]) -> Tensor:
        """Each segment is replayed as soon as it is recorded: the experts need its results."""
        self._stops.clear()
        with self._recorder.session():
            self._recording = True
            try:
                self._recorder.begin()
                logits = forward()
                self._last = self._recorder.end()
            finally:
                self._recording = False
            self._last.replay()
        return logits

    def replay(self) -> None:
        """Segment, experts, segment, ..."""
        assert self._last is not None
        for stop in self._stops:
            stop.before.replay()
            stop.compute()
        self._last.replay()


class DecodeGraphs:
    """Takes over the steps of one token of ``model``, whose cache is a :class:`DecodeCache`.

    ``experts`` are its modules by MoE layer, connected to their runners, ``make_steps`` gives a
    way to run steps, anew for each cache. ``say`` is told if the model cannot be recorded; it then
    runs as before.
    """

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        experts: Mapping[int, nn.Module],
        make_steps: Callable[[DecodeCache], Steps],
        *,
        say: Callable[[str], None],
    ) -> None:
        self.num_replays = 0
        self.mode = DecodeGraphsMode.OFF
        """How the last step of one token ran."""
        self._config = model.config
        self._idle: DecodeCache | None = None
        """What recorded steps know, and no sequence uses."""
        self._forward: Callable[..., Any] = model.forward
        self._make_steps, self._say = make_steps, say
        self._steps: Steps | None = None  # while one of ours runs
        self._current: _Recorded | None = None
        self._off = False
        for module in experts.values():
            self._interpose(module)
        model.forward = self._call

    @contextmanager
    def lend_cache(self, max_tokens: int) -> Iterator[DecodeCache]:
        """An empty cache for a sequence: that of the last one, if it was for as many.

        What was recorded with it is then replayed from the first step on.
        """
        size = room_for(max_tokens)
        idle, self._idle = self._idle, None
        if idle is not None and idle.max_tokens == size:
            cache = idle
            cache.reset()
        else:
            cache = DecodeCache(self._config, size)
        try:
            yield cache
        finally:
            if self._current is not None and self._current.cache is cache:
                self._idle = cache

    def forget(self) -> None:
        """Nothing that was recorded is to be replayed: the next steps record anew."""
        self._current = self._idle = None

    def close(self) -> None:
        """Lets go of what was recorded; the model is not called any more."""
        self.forget()
        self._steps = None
        self._forward = refuse_call

    def _interpose(self, module: nn.Module) -> None:
        seat = seat_of(module)
        seat.runner = _Interposed(self, seat.runner)

    def _call(self, *args: Any, **kwargs: Any) -> Any:  # noqa: ANN401
        cache = kwargs.get("past_key_values")
        if not isinstance(cache, DecodeCache):
            return self._forward(*args, **kwargs)
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None or ids.shape != (1, 1) or self._off or not cache.num_tokens:
            result = self._forward(*args, **kwargs)
            given = kwargs.get("inputs_embeds") if ids is None else ids
            assert given is not None, "the model was called without a token"
            cache.num_tokens += given.shape[1]
            return result
        with torch.no_grad():
            logits = self._step(ids, cache)
        cache.num_tokens += 1
        return CausalLMOutputWithPast(logits=logits, past_key_values=cache)

    def _step(self, ids: Tensor, cache: DecodeCache) -> Tensor:
        usable = self._current is not None and self._current.steps.valid
        if not usable or self._current is None or self._current.cache is not cache:
            self._current = _Recorded(self._make_steps(cache), cache, ids.clone())
        current = self._current
        self.mode = current.steps.mode
        current.token.copy_(ids)

        def forward() -> Tensor:
            result = self._forward(input_ids=current.token, past_key_values=cache, use_cache=True)
            logits: Tensor = result.logits
            return logits

        self._steps = current.steps
        try:
            if not current.warm:
                current.warm = True
                return current.steps.first(forward)
            if current.logits is None:
                current.logits = current.steps.record(forward)
            else:
                current.steps.replay()
                self.num_replays += 1
            # The recorded ones are overwritten by the next step.
            return current.logits.clone()
        except RuntimeError as error:
            if current.logits is not None or "captur" not in str(error):
                raise
            self._give_up(error, cache)
            return forward()
        finally:
            self._steps = None

    def _give_up(self, error: RuntimeError, cache: DecodeCache) -> None:
        self.forget()
        self._off, self._steps, self.mode = True, None, DecodeGraphsMode.OFF
        cache.rewind()
        self._say(
            "this model's steps cannot be recorded as CUDA graphs "
            f"({str(error).splitlines()[0]}); it runs without."
        )


def refuse_call(*_: Any, **__: Any) -> Any:  # noqa: ANN401
    """A closed model's ``forward``. Raises PreconditionError."""
    raise PreconditionError("This model was closed; load it again.")


@dataclass
class _Recorded:
    """The steps of one cache: a warm one, then a recorded one, then replays."""

    steps: Steps
    cache: DecodeCache
    token: Tensor  # [1, 1]
    warm: bool = False
    logits: Tensor | None = None


class _Interposed:
    """In the place of a runner: hands over to the steps that are being run, if any."""

    def __init__(self, graphs: DecodeGraphs, runner: ExpertsRunner) -> None:
        self._graphs, self._runner = graphs, runner

    def run(self, call: ExpertsCall, /) -> Tensor:
        """As the runner, or as the steps want it."""
        steps = self._graphs._steps
        return self._runner.run(call) if steps is None else steps.run(call)

    def prepare(self, call: ExpertsCall, /) -> ExpertsCall:
        """As it is."""
        return call
