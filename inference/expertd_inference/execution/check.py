"""Whether an executor computes what the model does: tried when a worker loads, on made-up texts.

The experts are not asked: each is an operation on a row, and reading them from disk would take
longer than all else. In their place stands something smooth that depends on the routing.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.executor import Executor
from expertd_inference.experts.call import ExpertsCall, experts_asked_of

NUM_SEQUENCES = 3
"""What a checked executor needs room for, each with one block."""
NUM_ROWS = 80

_Steps = Sequence[Sequence[tuple[str, int]]]

_STEPS: _Steps = (
    # A prompt alone; another two beside its first token; the rest of one of them; all go on.
    (("a", 5),),
    (("a", 1), ("b", 3), ("c", 6)),
    (("b", 4), ("a", 1)),
    (("c", 1), ("b", 1), ("a", 1)),
)
"""For each step the texts and how many rows of them."""
# So many that kernels for few rows give way to those for many.
_LONG_STEPS: _Steps = (
    (("a", 5),),
    (("a", 1), ("b", 39), ("c", 40)),
    (("b", 4), ("a", 1)),
    (("c", 1), ("b", 1), ("a", 1)),
)
_CHUNK_ROWS = 9

_TOLERANCES = {torch.float32: 1e-3, torch.float16: 0.03, torch.bfloat16: 0.1}
"""Of the error in the square mean: other kernels round otherwise, and add up in another order."""


class MismatchError(Exception):
    """The executor's logits are not the model's; the message says by how much."""


@torch.no_grad()
def check(executor: Executor, model: Any) -> None:  # noqa: ANN401 - transformers is untyped
    """Computes some steps. Raises MismatchError; leaves blocks and states 0 to 2 overwritten."""
    with without_experts(model):
        theirs = torch.cat([_plain(model, text) for text in _texts(model, _STEPS).values()])
        ours = _steps(executor, model, _STEPS)
    error = float((ours.float() - theirs.float()).norm() / theirs.float().norm())
    if not error <= _TOLERANCES.get(model.dtype, 0.1):  # nor if it is not a number
        raise MismatchError(f"its logits are off by {error:.2g}")


@torch.no_grad()
def check_exact(executor: Executor, model: Any) -> None:  # noqa: ANN401
    """As :func:`check`; raises MismatchError if any bits depend on what else a step computes."""
    alone = [((name, rows),) for step in _LONG_STEPS for name, rows in step]
    with without_experts(model):
        together = _steps(executor, model, _LONG_STEPS)
        if not torch.equal(together, _steps(executor, model, alone)):
            raise MismatchError("the bits of a row depend on the other rows of a step")
        if executor.shares_prefixes:
            divided = [
                ((name, min(_CHUNK_ROWS, len(text) - first)),)
                for name, text in _texts(model, _LONG_STEPS).items()
                for first in range(0, len(text), _CHUNK_ROWS)
            ]
            if not torch.equal(together, _steps(executor, model, divided)):
                raise MismatchError("the bits of a row depend on how a prompt is divided")


def _steps(executor: Executor, model: Any, steps: _Steps) -> Tensor:  # noqa: ANN401
    """The logits of all rows of all texts, text after text."""
    texts = _texts(model, steps)
    found: dict[str, list[Tensor]] = {name: [] for name in texts}
    for step in steps:
        spans = []
        for name, num_rows in step:
            position = sum(map(len, found[name]))
            number = "abc".index(name)
            rows = texts[name][position : position + num_rows]
            spans.append(Span(number, rows, position, [number], number, Wanted.ALL))
        for batch in batches(executor, spans):
            counts = [span.num_rows for span in batch.spans]
            parts = torch.split(executor.forward(batch), counts)
            for span, part in zip(batch.spans, parts, strict=True):
                found["abc"[span.sequence]].append(part)
    return torch.cat([part for parts in found.values() for part in parts])


def batches(executor: Executor, spans: Sequence[Span]) -> list[Batch]:
    """``spans`` as one batch, or each as one if the executor takes no more."""
    whole = Batch(tuple(spans))
    return [whole] if executor.fits(whole) else [Batch((span,)) for span in spans]


class _SmoothExperts:
    """Answers in the place of a layer's runner."""

    def run(self, call: ExpertsCall) -> Tensor:
        rows, weights = call.routed.rows, call.routed.weights
        shares = (1 + call.routed.index / call.num_experts) * weights
        return (rows * (0.1 * shares.sum(-1, keepdim=True))).to(rows.dtype)

    def prepare(self, call: ExpertsCall) -> ExpertsCall:
        return call


@contextmanager
def without_experts(model: Any) -> Iterator[None]:  # noqa: ANN401 - transformers is untyped
    """While ``model`` computes without reading experts."""
    with experts_asked_of(model, lambda _: _SmoothExperts()):
        yield


def _plain(model: Any, text: list[int]) -> Tensor:  # noqa: ANN401
    tokens = torch.tensor([text], device=model.device)
    logits: Tensor = model(input_ids=tokens, use_cache=False, return_dict=True).logits
    return logits[0]


def _texts(model: Any, steps: _Steps) -> dict[str, list[int]]:  # noqa: ANN401
    """As long as ``steps`` compute them; always the same."""
    num_tokens = model.get_input_embeddings().weight.shape[0]
    texts = {}
    for number, name in enumerate("abc"):
        length = sum(dict(step).get(name, 0) for step in steps)
        generator = torch.Generator().manual_seed(number)
        texts[name] = torch.randint(0, num_tokens, (length,), generator=generator).tolist()
    return texts
