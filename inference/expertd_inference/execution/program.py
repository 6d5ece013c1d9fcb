"""Steps by a program: one native call for each layer with experts, and one for the logits.

Between the products of a step Python costs more than the small operations themselves. Here a
model's parts (:mod:`.describe`) are written down once as operations on fixed memory
(:mod:`.assembly`), from the sum after one layer's experts to the routing of the next, for rows of
any sequences. Only the experts are asked by Python, since which of them are in RAM is for it to
find out. What no program can be made of is computed by the modules.
"""

from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from expertd_inference.execution.assembly import Assembly
from expertd_inference.execution.batch import Batch
from expertd_inference.execution.check import without_experts
from expertd_inference.execution.computing import computing
from expertd_inference.execution.describe import describe_model
from expertd_inference.execution.exact import make_exact
from expertd_inference.execution.held import HeldSegments
from expertd_inference.execution.layers import CannotBatchError, watch_layers
from expertd_inference.execution.modules import ModulesExecutor
from expertd_inference.execution.parts import ModelSpec, MoeSpec, UnknownPartError
from expertd_inference.execution.program_check import check_program
from expertd_inference.execution.room import Room
from expertd_inference.execution.step_rows import StepRows, use_memory
from expertd_inference.experts.keeping import ExpertTally
from expertd_inference.kernels.cpu.library import EXACT
from expertd_inference.kv.memory import KvLayer, KvMemory
from expertstore.errors import PreconditionError

CPU = torch.device("cpu")
MAX_WANTED = 64
"""Logits of so many rows are computed at once; of a large vocabulary they are megabytes a row."""
REASON = "all its parts are such as the program has, and gave the modules' results"


def make_program(
    model: Any,  # noqa: ANN401 - transformers is untyped
    num_blocks: int,
    max_rows: int,
    flags: int = 0,
) -> "ProgramExecutor":
    """A program of a transformers model that was held against the model's modules.

    The other arguments are those of :class:`ProgramExecutor`. Raises UnknownPartError if there is
    no program of it.
    """
    described, witness = describe_model(model)
    if flags & EXACT and any(isinstance(x.feed_forward, nn.Module) for x in described.layers):
        raise UnknownPartError("a part of it is computed by torch, whose bits depend on the rows")
    check_program(described, witness, flags)
    return ProgramExecutor(described, num_blocks, max_rows, flags)


class ProgramExecutor:
    """Computes steps of a model by a program; see :class:`.executor.Executor`."""

    name = "program"
    shares_prefixes = True
    recurrent = False
    turning_point: int | None = None

    def __init__(self, model: ModelSpec, num_blocks: int, max_rows: int, flags: int = 0) -> None:
        """``num_blocks`` of keys and values, for steps of at most ``max_rows`` rows.

        ``flags`` are those of :mod:`expertd_inference.kernels.cpu.library`.

        Raises PreconditionError where there are no native kernels.
        """
        self.reason = REASON
        assembly = Assembly(model, max_rows, min(max_rows, MAX_WANTED))
        self._assembly = assembly
        self._rows = StepRows(max_rows, flags)
        self._segments, self._last = assembly.segments(
            model.layers, assembly.entry, self._rows.address
        )
        self._angles = list(assembly.angles.values())
        self._num_tokens = len(model.embedding)
        self._num_routers = sum(isinstance(x.feed_forward, MoeSpec) for x in model.layers)
        self.tally = ExpertTally()
        self._model = model
        self._exact = bool(flags & EXACT)
        self._modules: ModulesExecutor | None = None
        """For spans with adapters, once there are some."""
        self._max_rows = max_rows
        layers = [layer.attention for layer in model.layers]
        self.memory = KvMemory(
            [KvLayer(layer.kv_heads, layer.key_width, layer.value_width) for layer in layers],
            num_blocks,
            assembly.dtype,
        )
        use_memory(assembly, self.memory)
        self._held: HeldSegments | None = None
        with suppress(ValueError):
            self._held = HeldSegments(self._segments, max_rows)

    def fits(self, batch: Batch) -> bool:
        """Whether it has not more rows than there is memory for, and none of an image."""
        seen = any(span.seen is not None for span in batch.spans)
        return batch.num_rows <= self._max_rows and not seen

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """Logits [batch.num_wanted, vocabulary]; good until the next step.

        Raises IndexError for what is no token, MemoryError, and what the experts raise.
        """
        if any(span.adapter is not None for span in batch.spans):
            return self._with_adapters(batch)
        with computing(batch.spans, CPU, self.tally):
            logits = self._forward(batch)
        if self._rows.step.kept:
            self.tally.add(self._num_routers * batch.num_rows, self._rows.num_kept)
        return logits

    def _forward(self, batch: Batch) -> Tensor:
        rows = self._rows
        num_wanted = rows.fill(batch, self._num_tokens)
        for angles in self._angles:
            angles.reserve(rows.num_positions)
        step, num_rows = rows.address, rows.step.rows
        done = 0 if self._held is None else self._held.run(step, num_rows)
        if 0 < done < len(self._segments):
            # Of this one the piece has run, and not all of its experts are in RAM.
            self._segments[done].finish(num_rows)
            done += 1
        for segment in self._segments[done:]:
            segment.run(num_rows)
        self._last.run(step)
        logits = self._assembly.logits
        if num_wanted <= len(logits):
            self._assembly.head.run(step)
            return logits[:num_wanted]
        parts = []
        for first in range(0, num_wanted, len(logits)):
            num = rows.want(first, min(len(logits), num_wanted - first))
            self._assembly.head.run(step)
            parts.append(logits[:num].clone())
        return torch.cat(parts)

    def _with_adapters(self, batch: Batch) -> Tensor:
        """Spans with adapters by the model's modules, over the same keys and values.

        Others as ever, so that their bits do not depend on whether such are beside them. Raises
        PreconditionError for a model whose modules cannot compute several sequences.
        """
        if self._modules is None:
            self._modules = self._make_modules()
        adapted = [span for span in batch.spans if span.adapter is not None]
        others = [span for span in batch.spans if span.adapter is None]
        logits: dict[int, Tensor] = {}
        for spans, executor in ((others, self), (adapted, self._modules)):
            if spans:
                found = executor.forward(Batch(tuple(spans))).clone()
                parts = torch.split(found, [span.num_wanted for span in spans])
                logits |= zip((span.sequence for span in spans), parts, strict=True)
        return torch.cat([logits[span.sequence] for span in batch.spans])

    def _make_modules(self) -> ModulesExecutor:
        model = self._model.model
        if self._exact:
            make_exact(model)
        try:
            with without_experts(model):
                layers = watch_layers(model)
        except CannotBatchError as error:
            raise PreconditionError(
                f"Adapters need a model whose modules compute several sequences, and {error}."
            ) from error
        room = Room(len(self.memory.keys[0]), 1, self._max_rows)
        return ModulesExecutor(model, layers, room, memory=self.memory)

    def copy_block(self, source: int, target: int) -> None:
        """Of :class:`.executor.Executor`."""
        self.memory.copy_block(source, target)

    def close(self) -> None:
        """Gives keys and values back; twice is harmless."""
        self.memory.close()
