"""A step by the model's own modules, with the rows of all sequences in one forward pass.

Modules work on rows; only attention and recurrent layers know sequences. So rows are packed as one
text, [1, rows], each with its own position, and attention (:mod:`.attention_hook`) appends each to
the blocks of its sequence and looks at these alone. Where layers keep recurrent states, sequences
that go on by one row are a batch, [sequences, 1], and other spans are computed one after another;
states are written back when all of the step is done. Where the angles of positions depend on how
long a text is, long texts have a forward pass of their own.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from expertd_inference.execution.attention_hook import attending
from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.computing import computing
from expertd_inference.execution.delta_hook import stepping
from expertd_inference.execution.inputs import rows_of
from expertd_inference.execution.layers import AttentionLayer, ModelLayers
from expertd_inference.execution.mutual import attend_mutually, mutual_rows
from expertd_inference.execution.room import Room
from expertd_inference.execution.step_cache import StateName, StepCache
from expertd_inference.experts.keeping import ExpertTally
from expertd_inference.kernels.cpu.attention import AttentionPlan, AttentionSpan, attend
from expertd_inference.kernels.cpu.delta import Places
from expertd_inference.kv.memory import KvMemory
from expertd_inference.kv.state_memory import StateMemory
from expertd_inference.model.cache_name import CACHE

_TOGETHER_BYTES = 4 << 20
"""Of one layer's state, of all sequences that a forward pass computes: torch makes several copies
of them, and copies that leave the cache cost more than what sequences share."""


class ModulesExecutor:
    """See :class:`~expertd_inference.execution.executor.Executor`."""

    name = "modules"

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        layers: ModelLayers,
        room: Room,
        *,
        continues: bool = True,
        alone: str = "",
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
        memory: KvMemory | None = None,
    ) -> None:
        """``layers`` are those of ``model``, whose attention is hooked.

        ``memory`` is another executor's, which closes it; without it there is one of its own.

        Some recurrent layers compute several rows only from their beginning on: unless the model
        ``continues``, later chunks of a prompt are computed row by row.
        ``alone`` is why sequences must not share a step, if so. All of a step is computed within
        ``around``, at whose end it may turn out to be lost. ``memory`` is another executor's, of
        the same layers; without, it has its own.
        """
        self.reason = "its modules compute rows of any sequences together"
        if layers.states:
            self.reason = "its modules decode sequences together, and compute prompts one by one"
        if alone:
            self.reason = f"its modules compute one sequence at a time, since {alone}"
        self.recurrent = bool(layers.states)
        self.shares_prefixes = not self.recurrent and not alone
        self.turning_point = layers.turning_point
        self.memory = memory or KvMemory(layers.keys, room.num_blocks, model.dtype)
        """Keys and values, by the numbers of ``layers.keys``."""
        self.layers = layers
        """Those that attend, and what all of them keep."""
        self.tally = ExpertTally()
        self._model = model
        self._continues = continues
        self._alone = alone
        self._around = around
        self._states = StateMemory(layers.states, room.num_sequences)
        copied = [layers.states[name] for name in layers.states.keys() - layers.in_place]
        largest = max((state.num_bytes for state in copied), default=1)
        self._most = max(1, _TOGETHER_BYTES // largest)

    def fits(self, batch: Batch) -> bool:
        """Any batch, or one span if sequences are to be alone."""
        return not self._alone or len(batch.spans) == 1

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """[batch.num_wanted, vocabulary]."""
        if self.recurrent:
            return self._recurrent(batch.spans)
        with self._around():
            return self._packed(batch.spans)

    def with_room(self, room: Room) -> "ModulesExecutor":
        """Another one, with memory of its own."""
        return ModulesExecutor(
            self._model,
            self.layers,
            room,
            continues=self._continues,
            alone=self._alone,
            around=self._around,
        )

    def copy_block(self, source: int, target: int) -> None:
        """Of :class:`.executor.Executor`."""
        with self._around():
            self.memory.copy_block(source, target)

    def close(self) -> None:
        """Unmaps the blocks."""
        self.memory.close()

    def _packed(self, spans: Sequence[Span]) -> Tensor:
        """One forward pass, or one for long texts and one for others if those differ."""
        point = math.inf if self.turning_point is None else self.turning_point
        short = [span for span in spans if span.position + span.num_rows <= point]
        long = [span for span in spans if span.position + span.num_rows > point]
        if not short or not long:
            return self._rows(spans)
        logits = _by_sequence(short, self._rows(short)) | _by_sequence(long, self._rows(long))
        return torch.cat([logits[span.sequence] for span in spans])

    def _recurrent(self, spans: Sequence[Span]) -> Tensor:
        """Those that go on by a row together, a few at a time; each other alone."""
        together = [span for span in spans if span.position and span.num_rows == 1]
        groups = [[span] for span in spans if span not in together]
        groups += [together[i : i + self._most] for i in range(0, len(together), self._most)]
        logits: dict[int, Tensor] = {}
        with self._around():
            for group in groups:
                logits |= _by_sequence(group, self._group(group))
        # Only now: a step that is lost has changed nothing.
        self._states.keep([_slot(span) for span in spans])
        return torch.cat([logits[span.sequence] for span in spans])

    def _group(self, group: list[Span]) -> Tensor:
        """The logits of one span, or of several that go on by a row."""
        slots = [_slot(span) for span in group]
        states: dict[StateName, Tensor] = {}
        in_place: Mapping[StateName, Tensor] = {}
        if group[0].position and group[0].num_rows == 1:
            in_place = {name: self._states.states[name] for name in self.layers.in_place}
        if group[0].position:
            states = self._states.gather(slots, self.layers.states.keys() - in_place.keys())
        places = Places(self._states.now(slots), self._states.next(slots)) if in_place else None
        rows = []
        for piece in self._pieces(group):
            cache = StepCache(self._model.config, {**states, **in_place})
            with stepping(places):
                rows.append(self._rows(piece, cache))
            states = cache.states()
        gathered = states.keys() - in_place.keys()
        self._states.scatter(slots, {name: states[name] for name in gathered})
        return torch.cat(rows)

    def _pieces(self, group: list[Span]) -> Iterator[list[Span]]:
        """What of ``group`` one forward pass computes, in order."""
        span = group[0]
        if self._continues or not span.position or span.num_rows == 1:
            yield group
            return
        for row, token in enumerate(span.tokens):
            last = row == span.num_rows - 1
            wanted = Wanted.NONE if span.wanted is Wanted.LAST and not last else span.wanted
            yield [replace(span, tokens=[token], position=span.position + row, wanted=wanted)]

    def _rows(self, spans: Sequence[Span], cache: StepCache | None = None) -> Tensor:
        """The logits of these spans' wanted rows; with ``cache`` all have the same length."""
        wanted = _wanted(spans)
        num_texts = 1 if cache is None else len(spans)
        # The head costs too much for rows that nobody wants; it is asked for one at least.
        kept = wanted or [0] if num_texts == 1 else [0]
        device = self._model.device
        with (
            attending(_Rows(self.layers.attention, self.memory, spans)),
            computing(spans, device, self.tally),
        ):
            logits: Tensor = self._model(
                **rows_of(self._model, spans, num_texts),
                **{CACHE: cache},
                use_cache=False,
                logits_to_keep=torch.tensor(kept, device=device),
                return_dict=True,
            ).logits
        logits = logits.flatten(0, 1)
        return logits[: len(wanted)] if num_texts == 1 else logits[wanted]


class _Rows:
    """Attention of one forward pass: each row to its own sequence."""

    def __init__(
        self,
        layers: Mapping[nn.Module, AttentionLayer],
        memory: KvMemory,
        spans: Sequence[Span],
    ) -> None:
        self._layers = layers
        self._memory = memory
        self._plan = AttentionPlan(
            [AttentionSpan(span.position, span.num_rows, span.blocks) for span in spans]
        )
        self._mutual = mutual_rows(spans)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        others: dict[str, Any],
    ) -> Tensor:
        """Appends ``key`` and ``value``, and attends."""
        layer = self._layers[module]
        batch, _, length, _ = query.shape
        query, key, value = (_as_rows(part) for part in (query, key, value))
        keys, values = self._memory.keys[layer.number], self._memory.values[layer.number]
        scale = query.shape[2] ** -0.5 if scaling is None else scaling
        attended = attend(
            self._plan,
            keys,
            values,
            query,
            key if layer.appends else None,
            value if layer.appends else None,
            scale,
            window=layer.window,
            sinks=others.get("s_aux"),
            softcap=others.get("softcap"),
        )
        if layer.window is not None:
            for image in self._mutual:
                attended[image.rows] = attend_mutually(
                    image, query[image.rows], keys, values, scale, layer.window
                )
        return attended.view(batch, length, *attended.shape[1:])

    def mask(
        self,
        make: Callable[..., Tensor | None],
        arguments: dict[str, Any],
    ) -> None:
        """None: no row sees another sequence's."""


def _as_rows(part: Tensor) -> Tensor:  # [batch, heads, T, d] -> [batch * T, heads, d]
    rows = part[0].transpose(0, 1) if part.shape[0] == 1 else part.transpose(1, 2).flatten(0, 1)
    return rows if rows.stride(2) == 1 else rows.contiguous()


def _wanted(spans: Sequence[Span]) -> list[int]:
    """The rows that want logits."""
    wanted: list[int] = []
    first = 0
    for span in spans:
        last = first + span.num_rows
        wanted += range(last - span.num_wanted, last)
        first = last
    return wanted


def _by_sequence(spans: Sequence[Span], logits: Tensor) -> dict[int, Tensor]:
    """The logits of each."""
    parts = torch.split(logits, [span.num_wanted for span in spans])
    return {span.sequence: part for span, part in zip(spans, parts, strict=True)}


def _slot(span: Span) -> int:
    if span.state is None:
        raise ValueError(f"sequence {span.sequence} has no slot for its recurrent states")
    return span.state
