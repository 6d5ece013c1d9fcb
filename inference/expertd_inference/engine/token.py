"""One generated token, as a client of the engine sees it; needs no torch."""

from dataclasses import dataclass, field

from expertd_inference.engine.stops import FinishReason

Likely = tuple[float, tuple[tuple[int, float], ...]]
"""A token's log-probability, and the likeliest tokens, the likeliest first, with theirs."""


@dataclass(frozen=True, slots=True)
class Opening:
    """What is known of a sequence once its prompt is computed.

    ``num_cached_tokens`` of its tokens were found as a prefix and not computed.
    ``queued_seconds`` it waited for its turn. ``prompt_logprobs`` are those of the prompt's tokens
    from the second on, None unless asked for. Images take ``num_image_tokens`` more than the
    places that the prompt was sent with.
    """

    num_cached_tokens: int
    queued_seconds: float
    prompt_logprobs: tuple[Likely, ...] | None = None
    num_image_tokens: int = 0


@dataclass(frozen=True, slots=True)
class Token:
    """A token that was chosen, and the text that is certain because of it.

    The ``text`` of a stream's tokens together is the new text. A token's own may be empty: where
    it ends within a character, is a special token, or may be the beginning of a stop string.
    ``logprob`` is the natural logarithm of the token's probability, and ``top_logprobs`` are the
    likeliest tokens and theirs, the likeliest first; None and empty unless asked for by
    ``GenerationSettings.logprobs``. The first token of a stream has an ``opening``, which tells
    of the run and is not compared; the last one has a ``finish_reason``, and ``stop`` is the token
    or the text that stopped it, if any did.
    """

    id: int
    text: str
    logprob: float | None = None
    top_logprobs: tuple[tuple[int, float], ...] = ()
    finish_reason: FinishReason | None = None
    opening: Opening | None = field(default=None, compare=False)
    stop: int | str | None = None
