"""One sequence after the other, each with a cache that the model makes for itself.

For models whose layers keep something else than keys, values and recurrent states. Slow: each
sequence reads all weights for itself.
"""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.computing import computing
from expertd_inference.experts.keeping import ExpertTally
from expertd_inference.model.cache_name import CACHE
from expertd_inference.model.pack_config import turning_points


@dataclass
class _Text:
    """A sequence so far; ``cache`` has its keys, values and whatever else the model keeps."""

    tokens: list[int] = field(default_factory=list)
    cache: Any = None


class TurnsExecutor:
    """See :class:`~expertd_inference.execution.executor.Executor`."""

    name = "turns"
    shares_prefixes = False
    recurrent = False
    turning_point: int | None = None

    def __init__(
        self,
        model: Any,  # noqa: ANN401 - transformers is untyped
        reason: str,
        around: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        """Each span is computed within ``around``, at whose end it may turn out to be lost."""
        self.reason = reason
        self.tally = ExpertTally()
        self._around = around
        self._model = model
        self._texts: dict[int | None, _Text] = {}  # by slot
        points = turning_points(model.config.get_text_config())
        # Longer texts have other angles from their first position on.
        self._turning_point = min(points, default=float("inf"))

    def fits(self, batch: Batch) -> bool:
        """A span at a time."""
        return len(batch.spans) == 1

    @torch.no_grad()
    def forward(self, batch: Batch) -> Tensor:
        """[batch.num_wanted, vocabulary]; of any number of spans, each on its own."""
        return torch.cat([self._span(span) for span in batch.spans])

    def copy_block(self, source: int, target: int) -> None:
        """Nobody asks: it shares no prefixes."""

    def close(self) -> None:
        """Forgets all sequences."""
        self._texts.clear()

    def _span(self, span: Span) -> Tensor:
        text = self._texts.get(span.state, _Text())
        if len(text.tokens) < span.position:
            raise ValueError(f"sequence {span.sequence} goes on from rows that were not computed")
        end = span.position + span.num_rows
        if len(text.tokens) > span.position or span.position <= self._turning_point < end:
            # It begins anew, or a step was lost, or positions change their meaning.
            text = _Text(text.tokens[: span.position])
        # If the step is lost, what its cache has is not used again.
        self._texts[span.state] = _Text(text.tokens[: span.position])
        fresh = [*([] if text.cache is not None else text.tokens), *span.tokens]
        with self._around():
            logits = self._forward(text, fresh, span)
        text.tokens += span.tokens
        self._texts[span.state] = text
        return logits

    def _forward(self, text: _Text, tokens: list[int], span: Span) -> Tensor:
        device = self._model.device
        end = span.position + span.num_rows
        with computing([replace(span, tokens=tokens)], device, self.tally):
            out = self._model(
                input_ids=torch.tensor([tokens], device=device),
                position_ids=torch.arange(end - len(tokens), end, device=device)[None],
                **{CACHE: text.cache},
                use_cache=True,
                logits_to_keep=span.num_rows if span.wanted is Wanted.ALL else 1,
                return_dict=True,
            )
        text.cache = out[CACHE]
        logits: Tensor = out.logits[0]
        return logits[: span.num_wanted]
