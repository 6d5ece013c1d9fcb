"""One generated token, as a client of the engine sees it."""

from dataclasses import dataclass

from expertd_inference.engine.stops import FinishReason


@dataclass(frozen=True, slots=True)
class Token:
    """A token that was chosen, and the text that is certain because of it.

    The ``text`` of a stream's tokens together is the new text. A token's own may be empty: where
    it ends within a character, is a special token, or may be the beginning of a stop string.
    ``logprob`` is the natural logarithm of the token's probability, and ``top_logprobs`` are the
    likeliest tokens and theirs, the likeliest first; None and empty unless asked for by
    ``GenerationSettings.logprobs``. The last token has a ``finish_reason``.
    """

    id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
