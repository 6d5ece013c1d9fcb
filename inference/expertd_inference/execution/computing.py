"""What a thread has to know of the rows that it computes: their experts and their adapters."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from expertd_inference.execution.batch import Span
from expertd_inference.experts.adapting import AdaptedRows, adapting
from expertd_inference.experts.keeping import ExpertTally, KeptExperts, keeping


@contextmanager
def computing(spans: Sequence[Span], device: torch.device, tally: ExpertTally) -> Iterator[None]:
    """Tells the layers, while this thread computes ``spans`` on ``device``, what rows ask for.

    ``tally`` counts the experts of all rows of a step in which a span keeps fewer than its routers
    choose; other steps need no counting.
    """
    kept = adapted = None
    if any(span.fewer is not None for span in spans):
        kept = KeptExperts([(span.fewer, span.num_rows) for span in spans], device)
    if any(span.adapter is not None for span in spans):
        adapted = AdaptedRows([(span.adapter, span.num_rows) for span in spans], device)
    with keeping(kept), adapting(adapted):
        yield
    if kept is not None:
        kept.add_to(tally)
