"""Steps of one row a sequence by replay: recorded once, for a few batch sizes, when a worker loads.

What a device is asked for in a step costs the host longer to ask than the device to do. So it is
recorded, as CUDA graphs, and repeated on the same memory (:mod:`.graph_rows`). Two ways:

- *segments*: a recording is cut where the model calls its experts. Between two segments the host
  reads the routing and lets the experts be computed as always.
- *whole*: the device finds and copies experts by itself (:mod:`..device.gpu_driven`), a step is one
  recording, and the host looks once, at its end, whether an expert was not in RAM. Then the daemon
  brings it, and the step is repeated.

Prompts, and batches that no recording fits, are computed by the modules, over the same blocks.
"""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from expertd_inference.device.group import DeviceGroup
from expertd_inference.device.recorder import GraphRecorder, Recording
from expertd_inference.device.whole import WholeExperts
from expertd_inference.execution.attention_hook import attending
from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.computing import computing
from expertd_inference.execution.graph_rows import GraphAttention, GraphRows
from expertd_inference.execution.modules import ModulesExecutor
from expertd_inference.execution.room import Room
from expertd_inference.execution.segment import ExpertsRest, Segment
from expertd_inference.execution.step_cache import StepCache
from expertd_inference.experts.call import (
    ExpertsCall,
    ExpertsRunner,
    ExpertsSeat,
    experts_asked_of,
)
from expertd_inference.experts.keeping import keep_fewer
from expertd_inference.kernels.blocks import BLOCK_TOKENS
from expertd_inference.model.cache_name import CACHE
from expertd_inference.settings import DecodeGraphsMode

SEGMENTS, WHOLE = DecodeGraphsMode.SEGMENTS, DecodeGraphsMode.WHOLE

MAX_SIZE = 32
"""Recorded steps have up to so many rows."""
SHORT_TOKENS = 1024
"""Attention of a recorded step costs by the longest text that it has room for: there are recordings
for texts up to here, and for four times as many, and so on to the longest."""
MAX_GATHERED_BYTES = 128 << 20
"""Attention of a recorded step copies the keys of all tables, and a few times as much beside them:
a step that would copy more of a layer than this is not recorded."""


class GraphSegment(Segment):
    """A segment whose piece is recorded; the experts of rows that a step lacks are not asked."""

    def __init__(self, recording: Recording, rest: ExpertsRest, result: Tensor) -> None:
        """The next recording reads ``result`` [size, H]."""
        super().__init__(rest)
        self._recording, self._result = recording, result

    def run_piece(self) -> None:
        """As :class:`.segment.Segment`."""
        self._recording.replay()

    def read(self, result: Tensor) -> None:
        """As :class:`.segment.Segment`."""
        self._result[: len(result)].copy_(result)


class _KeepingRest(ExpertsRest):
    """The experts of one layer, of which rows may keep fewer than the recorded routing has."""

    def compute(self, num_rows: int) -> Tensor:
        return self.seat.runner.run(keep_fewer(self.call_of(num_rows)))


class _RecordedStep:
    """A recorded step: segments, of which a whole one has none, and a last piece."""

    def __init__(self, rows: GraphRows, whole: WholeExperts | None) -> None:
        self.rows = rows
        self.whole = whole
        self.segments: list[GraphSegment] = []
        self.last: Recording | None = None
        self.logits = torch.empty(0)  # [size, vocabulary] once it is recorded

    def run(self, num_rows: int) -> Tensor:
        """The logits [num_rows, vocabulary], good until the next step of any size."""
        assert self.last is not None
        if self.whole is not None:
            self.whole.until_complete(self.last.replay)
        else:
            for segment in self.segments:
                segment.run(num_rows)
            self.last.replay()
        return self.logits[:num_rows]


class GraphsExecutor:
    """See :class:`~expertd_inference.execution.executor.Executor`."""

    name = "graphs"
    recurrent = False
    turning_point: int | None = None
    shares_prefixes = True

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        modules: ModulesExecutor,
        group: DeviceGroup,
        room: Room,
        longest_tokens: int,
        *,
        segments: bool = False,
    ) -> None:
        """Records all steps.

        ``modules`` computes what is not recorded; its memory has a block more than ``room``, which
        is no sequence's. ``group`` has one device, on which all of ``model`` lies. No text has
        more than ``longest_tokens``. Without ``segments`` steps are whole where they can be.
        Raises RuntimeError if the model cannot be recorded.
        """
        self._model, self._modules, self._group = model, modules, group
        self.tally = modules.tally
        self._segments = segments
        self._device = group.devices[0]
        self._scratch = room.num_blocks
        self._longest = min(-(-longest_tokens // BLOCK_TOKENS), room.num_blocks)
        self._sizes = _sizes(min(room.num_sequences, MAX_SIZE))
        memory = modules.memory
        self._block_bytes = max(x[0].nbytes for x in (*memory.keys, *memory.values))
        self._steps: dict[tuple[int, int], _RecordedStep] = {}
        self._whole: WholeExperts | None = None
        self._record()
        self.reason = (
            f"its steps are recorded ({self.mode}) for up to {self._sizes[-1]} sequences; prompts "
            "are computed by its modules"
            + (", and so is what keeps fewer experts" if self._whole is not None else "")
            + ", and what has an adapter"
        )

    @property
    def mode(self) -> DecodeGraphsMode:
        """How steps of one sequence run."""
        return SEGMENTS if self._whole is None else WHOLE

    def fits(self, batch: Batch) -> bool:
        """Always."""
        return True

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """[batch.num_wanted, vocabulary]."""
        with self._group.transaction.forward_pass():
            if self._whole is not None and not self._whole.valid:
                self._record()  # The arena lies elsewhere since the daemon came back.
            step = self._step_for(batch.spans)
            if step is None:
                return self._modules.forward(batch)
            step.rows.fill(batch.spans, self._device.to_device)
            # What is recorded writes there again.
            with computing(batch.spans, self._device.torch_device, self.tally):
                logits = step.run(len(batch.spans)).clone()
        self._group.num_replays += 1
        self._group.steps = SEGMENTS if step.whole is None else WHOLE
        wanted = [row for row, span in enumerate(batch.spans) if span.wanted is not Wanted.NONE]
        return logits if len(wanted) == len(logits) else logits[wanted]

    def copy_block(self, source: int, target: int) -> None:
        """Of Executor."""
        self._modules.copy_block(source, target)

    def close(self) -> None:
        """Lets go of what was recorded, and of keys and values."""
        self._steps.clear()
        self._whole = None
        self._modules.close()

    def _step_for(self, spans: Sequence[Span]) -> _RecordedStep | None:
        """The smallest recorded one that these spans fit; None if they fit none."""
        if not spans or any(span.num_rows > 1 or span.seen is not None for span in spans):
            return None
        if any(span.adapter is not None for span in spans):
            return None  # It was recorded with the model's own layers.
        if self._whole is not None and any(span.fewer is not None for span in spans):
            return None  # Its routing is computed as it was recorded.
        size = next((size for size in self._sizes if size >= len(spans)), None)
        longest = max(span.position // BLOCK_TOKENS + 1 for span in spans)
        width = next((width for width in _widths(self._longest) if width >= longest), None)
        return None if size is None or width is None else self._steps.get((size, width))

    @torch.no_grad()
    def _record(self) -> None:
        """All steps anew, the largest first: its memory is enough for the others."""
        self._steps.clear()
        recorder = self._device.recorder()
        self._whole = None if self._segments else self._group.whole_experts(recorder)
        with self._group.transaction.forward_pass(), recorder.session():
            for size in reversed(self._sizes):
                whole = self._whole
                if whole is not None and not whole.fits(size):
                    whole = None
                for width in reversed(_widths(self._longest)):
                    if size * width * self._block_bytes > MAX_GATHERED_BYTES:
                        continue
                    rows = GraphRows(size, width, self._scratch, self._device.torch_device)
                    step = _RecordedStep(rows, whole)
                    self._record_step(step, recorder)
                    self._steps[size, width] = step

    def _record_step(self, step: _RecordedStep, recorder: GraphRecorder) -> None:
        cuts = _Cuts(step, recorder)
        with experts_asked_of(self._model, lambda seat: _Cut(cuts, seat)):
            # What has to be compiled or allocated once is, by this one.
            if step.whole is not None:
                step.whole.begin_trial()
            self._forward(step.rows, StepCache(self._model.config))
            cache = StepCache(self._model.config)
            cuts.recording = True
            recorder.begin()
            step.logits = self._forward(step.rows, cache)
            step.last = recorder.end()

    def _forward(self, rows: GraphRows, cache: StepCache) -> Tensor:  # [size, vocabulary]
        with attending(GraphAttention(self._modules.layers.attention, self._modules.memory, rows)):
            logits: Tensor = self._model(
                input_ids=rows.tokens,
                position_ids=rows.angles[None],
                # Without one it looks into the positions for texts that were packed together.
                **{CACHE: cache},
                use_cache=False,
                return_dict=True,
            ).logits
        return logits[0]


class _Cuts:
    """Where the recording of ``step`` is cut: wherever the model asks for experts.

    Until ``recording`` is set nothing is recorded, and experts are not read.
    """

    def __init__(self, step: _RecordedStep, recorder: GraphRecorder) -> None:
        self._step, self._recorder = step, recorder
        self.recording = False

    def ask(self, seat: ExpertsSeat, call: ExpertsCall) -> Tensor:
        """What stands for the result; it is there once the step is replayed."""
        routed = call.routed
        if self._step.whole is not None:
            index = routed.index.masked_fill(~self._step.rows.real, call.num_experts)
            return self._step.whole.run(call.with_rows(replace(routed, index=index)))
        if not self.recording:
            return torch.zeros_like(routed.rows)
        recording = self._recorder.end()
        # Outside of the recordings' memory: theirs may be used again by later segments.
        result = torch.zeros_like(routed.rows)
        rest = _KeepingRest(seat, routed)
        self._step.segments.append(GraphSegment(recording, rest, result))
        self._recorder.begin()
        return result


class _Cut(ExpertsRunner):
    """In the place of what computes the experts of ``seat``, while a step is recorded."""

    def __init__(self, cuts: _Cuts, seat: ExpertsSeat) -> None:
        self._cuts, self._seat = cuts, seat

    def run(self, call: ExpertsCall, /) -> Tensor:
        return self._cuts.ask(self._seat, call)

    def prepare(self, call: ExpertsCall, /) -> ExpertsCall:
        return call


def _sizes(most: int) -> list[int]:
    """1, 2, 4 ... and ``most``."""
    return [*(1 << power for power in range((most - 1).bit_length())), most]


def _widths(longest: int) -> list[int]:
    """The blocks of tables: of short texts, four times as many ... and ``longest``."""
    widths = []
    width = SHORT_TOKENS // BLOCK_TOKENS
    while width < longest:
        widths.append(width)
        width *= 4
    return [*widths, longest]
