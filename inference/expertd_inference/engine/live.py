"""A sequence in the engine: how its tokens are chosen, and what becomes of them."""

import time
from dataclasses import dataclass, field
from typing import Any

from expertd_inference.engine.channel import Outlet
from expertd_inference.engine.matcher import Matcher
from expertd_inference.engine.sampling import Sampler, Sampling
from expertd_inference.engine.sequence import Sequence
from expertd_inference.engine.stops import TokenText
from expertd_inference.engine.token import Likely, Token


@dataclass(slots=True)
class Live:
    """A sequence that is not complete, and what becomes of its tokens."""

    sequence: Sequence
    sampler: Sampler
    text: TokenText
    outlet: Outlet[Token]
    prompt_logprobs: list[Likely] = field(default_factory=list)
    """Of the prompt's tokens from the second on, as far as they are computed and asked for."""
    added: float = field(default_factory=time.monotonic)
    """When the scheduler accepted it."""
    begun: float | None = None
    """When it was first in a step."""
    has_opened: bool = False
    """Whether a token was delivered."""


def live_of(
    sequence: Sequence,
    outlet: Outlet[Token],
    tokenizer: Any,  # noqa: ANN401 - transformers is untyped
    sampling: Sampling,
    end_tokens: frozenset[int],
    stop: tuple[str, ...] = (),
    matcher: Matcher | None = None,
) -> Live:
    """For a sequence that the scheduler has accepted; ``stop`` are the pack's own stop strings.

    ``matcher`` is that of its grammar, if it has one.
    """
    text = TokenText(tokenizer, sequence.settings, end_tokens, sequence.max_new_tokens, stop)
    for token in sequence.tokens[sequence.num_prompt :]:
        text.feed(token)  # Whoever has the token has had its text.
    sampler = Sampler(sampling, sequence.seed, sequence.num_prompt, matcher)
    return Live(sequence, sampler, text, outlet)
