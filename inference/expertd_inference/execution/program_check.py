"""Holds a program against the modules that it was made of, layer by layer.

Each layer is given what entered its module in the run that was watched (:mod:`.witness`), so that
an error shows where it is made, and does not grow with the layers. The text comes in two chunks,
the second beside another sequence: rows must see their own sequence, and all of it.
"""

import torch
from torch import Tensor

from expertd_inference.execution.assembly import Assembly
from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.parts import ModelSpec, UnknownPartError
from expertd_inference.execution.step_rows import StepRows, use_memory
from expertd_inference.execution.witness import NUM_TOKENS, Witness, experts_stood_in_for
from expertd_inference.kernels.cpu.program import RowsProgram
from expertd_inference.kv.memory import KvLayer, KvMemory

_FIRST_CHUNK = 7
_MAX_ROWS = 2 * NUM_TOKENS
_TOLERANCE = 0.05
"""Of what a layer adds to the stream; kernels round otherwise, and add up in another order."""
_MAX_WRONG = 1 / 4
"""Share of the rows that may be off by more: where two experts are equally likely."""


@torch.no_grad()
def check_program(model: ModelSpec, witness: Witness, flags: int = 0) -> None:
    """Raises UnknownPartError, which names the part that is computed otherwise."""
    assembly = Assembly(model, _MAX_ROWS, _MAX_ROWS)
    layers = [layer.attention for layer in model.layers]
    kv = [KvLayer(each.kv_heads, each.key_width, each.value_width) for each in layers]
    with KvMemory(kv, 2, assembly.dtype) as memory, experts_stood_in_for(model.model):
        rows = StepRows(_MAX_ROWS, flags)
        programs = [
            assembly.segments([layer], RowsProgram(), rows.address) for layer in model.layers
        ]
        use_memory(assembly, memory)
        for angles in assembly.angles.values():
            angles.reserve(NUM_TOKENS)
        tokens = witness.tokens
        first = Span(0, tokens[:_FIRST_CHUNK], 0, (0,), None, Wanted.NONE)
        rest = Span(0, tokens[_FIRST_CHUNK:], _FIRST_CHUNK, (0,), None, Wanted.ALL)
        whole = Span(1, tokens, 0, (1,), None, Wanted.ALL)
        results: list[list[Tensor]] = [[] for _ in programs]
        for spans in ((first,), (rest, whole)):
            rows.fill(Batch(spans), len(model.embedding))
            places = [
                i for span in spans for i in range(span.position, span.position + len(span.tokens))
            ]
            for number, (segments, last) in enumerate(programs):
                seen = witness.layers[number]
                assembly.stream[: len(places)] = seen.entered[0, places]
                for segment in segments:
                    segment.run(len(places))
                last.run(rows.address)
                results[number].append(assembly.stream[: len(places)].clone())
        for number, parts in enumerate(results):
            seen = witness.layers[number]
            assert seen.left is not None
            expected = torch.cat((seen.left[0], seen.left[0]))
            entered = torch.cat((seen.entered[0], seen.entered[0]))
            if not _near(torch.cat(parts), expected, expected - entered):
                raise UnknownPartError(f"its layer {number} computes something else")
        _check_ends(assembly, rows, model, witness)


def _check_ends(assembly: Assembly, rows: StepRows, model: ModelSpec, witness: Witness) -> None:
    """The embedding, which is the first layer's entry, and the head."""
    whole = Span(1, witness.tokens, 0, (1,), None, Wanted.ALL)
    rows.fill(Batch((whole,)), len(model.embedding))
    assembly.entry.run(rows.address)
    entered = witness.layers[0].entered[0]
    if not _near(assembly.stream[:NUM_TOKENS], entered, entered):
        raise UnknownPartError("its embedding is something else")
    left = witness.layers[-1].left
    assert left is not None
    assembly.stream[:NUM_TOKENS] = left[0]
    assembly.head.run(rows.address)
    logits = witness.logits[0].to(assembly.dtype)
    if not _near(assembly.logits[:NUM_TOKENS], logits, logits):
        raise UnknownPartError("its logits are something else")


def _near(ours: Tensor, theirs: Tensor, added: Tensor) -> bool:
    """Rows [T, H] that differ by little of ``added``."""
    error = (ours.float() - theirs.float()).norm(dim=1)
    rounding = 2 * torch.finfo(theirs.dtype).eps * theirs.float().norm(dim=1)
    wrong = ~(error <= _TOLERANCE * added.float().norm(dim=1) + rounding)
    return bool(wrong.float().mean() <= _MAX_WRONG)
