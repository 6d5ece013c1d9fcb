"""The rows of a step that keep fewer experts than their routers choose."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from expertd_inference.execution.batch import Span
from expertd_inference.experts.keeping import ExpertTally, KeptExperts, keeping


@contextmanager
def keeping_fewer(
    spans: Sequence[Span], device: torch.device, tally: ExpertTally
) -> Iterator[None]:
    """While this thread computes ``spans`` on ``device``; ``tally`` counts the experts of these."""
    if all(span.fewer is None for span in spans):
        yield
        return
    kept = KeptExperts([(span.fewer, span.num_rows) for span in spans], device)
    with keeping(kept):
        yield
    kept.add_to(tally)
