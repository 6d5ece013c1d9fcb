"""From sessions' accesses, one expert after the other, to the rows of a trace."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

from expertstore.trace import Phase, Row, TraceModel

_MAX_ROWS_PER_LAYER = 16
"""Of one step: what goes on in one layer for longer is written in several steps."""


@dataclass
class _Step:
    """What a session does now: its layer, the experts there, and the rows before."""

    number: int = 0
    layer: int = -1
    experts: dict[int, None] = field(default_factory=dict)
    rows: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)


class TraceRecorder:
    """Cuts each session's accesses into rows, and gives them to ``write``, step after step.

    What a worker asks for together stands together in its ring, but without an end. A row
    ends where the layer changes or an expert comes again, a step where the layer goes down.
    A step that uses more experts of a layer than a token does is a prompt (or several
    sequences at once, which look the same): ``prefill``, each row the merged set of what its
    tokens used, as the worker asked for it. With a single MoE layer nothing tells where a
    token ends but their number, so that rows are cut at one token's.
    """

    def __init__(self, model: TraceModel, write: Callable[[Row], None]) -> None:
        self._model, self._write = model, write
        self._firsts = list(accumulate(model.num_experts, initial=0))
        self._steps: dict[int, _Step] = {}

    def take(self, session: int, entries: Sequence[int]) -> None:
        """Takes the session's next accesses; entries that the model has not are left out."""
        step = self._steps.setdefault(session, _Step())
        num_layers = len(self._model.num_experts)
        single, most = num_layers == 1, _MAX_ROWS_PER_LAYER * num_layers
        for entry in entries:
            if not 0 <= entry < self._firsts[-1]:
                continue
            layer = bisect_right(self._firsts, entry) - 1
            again = entry in step.experts
            full = single and len(step.experts) >= self._model.experts_per_token[0]
            if layer < step.layer or full or (single and again) or len(step.rows) >= most:
                self._end_step(session, step)
            elif layer != step.layer or again:
                _end_row(step)
            step.layer = layer
            step.experts[entry] = None

    def end(self, session: int) -> None:
        """Writes what the session has begun: it has ended, or some of its accesses are lost."""
        step = self._steps.get(session)
        if step is not None:
            self._end_step(session, step)

    def forget(self, session: int) -> None:
        """The session has ended."""
        self.end(session)
        self._steps.pop(session, None)

    def finish(self) -> None:
        """Writes what all sessions have begun."""
        for session in list(self._steps):
            self.forget(session)

    def _end_step(self, session: int, step: _Step) -> None:
        _end_row(step)
        is_prompt = any(
            len(experts) > self._model.experts_per_token[layer] for layer, experts in step.rows
        )
        phase = Phase.PREFILL if is_prompt else Phase.DECODE
        for layer, entries in step.rows:
            first = self._firsts[layer]
            experts = tuple(entry - first for entry in entries)
            self._write(Row(phase, step.number, layer, experts, session))
        step.number += bool(step.rows)
        step.rows.clear()
        step.layer = -1


def _end_row(step: _Step) -> None:
    if step.experts:
        step.rows.append((step.layer, tuple(step.experts)))
        step.experts.clear()
