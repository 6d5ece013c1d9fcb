"""New tokens as they come: their times, and the text that they make."""

import time
from collections.abc import Callable
from typing import Any

from torch import Tensor
from transformers.generation.streamers import BaseStreamer

_INCOMPLETE = "\ufffd"
"""What decoders put for bytes that are no whole character."""


class TokenStreamer(BaseStreamer):  # type: ignore[misc] # transformers is untyped
    """A transformers streamer that notes when each token came and passes on its text.

    Text is passed on as soon as later tokens cannot change it: once it does not end in the
    middle of a character. A token's text depends on its neighbours (spaces, for one), so it is
    the difference that the token makes to the text of the few tokens before it (the method
    of text-generation-inference's ``decode_token``); the pieces add up to the whole text.
    """

    def __init__(self, tokenizer: Any, on_text: Callable[[str], None] | None = None) -> None:  # noqa: ANN401
        self.tokens: list[int] = []
        self.times: list[float] = []
        self._tokenizer = tokenizer
        self._on_text = on_text
        self._prompt_seen = False
        # The text of tokens[:_passed] has been passed on; _context is where that of the
        # tokens before, which theirs is compared with, begins.
        self._context = 0
        self._passed = 0

    @property
    def tokens_per_second(self) -> float | None:
        """After the first token, which is the prompt's doing; None below two tokens."""
        if len(self.times) < 2:
            return None
        return (len(self.times) - 1) / (self.times[-1] - self.times[0])

    def put(self, value: Tensor) -> None:
        """Takes the prompt first, [1, T], and then each new token, [1]."""
        if not self._prompt_seen:
            self._prompt_seen = True
            return
        self.times.append(time.perf_counter())
        self.tokens.extend(value.flatten().tolist())
        self._pass_on(at_end=False)

    def end(self) -> None:
        """Passes on what is left; a second call does nothing."""
        self._pass_on(at_end=True)

    def _pass_on(self, *, at_end: bool) -> None:
        if self._on_text is None:
            return
        before = self._decode(self.tokens[self._context : self._passed])
        text = self._decode(self.tokens[self._context :])
        if len(text) <= len(before) or (text.endswith(_INCOMPLETE) and not at_end):
            return
        self._context, self._passed = self._passed, len(self.tokens)
        self._on_text(text[len(before) :])

    def _decode(self, tokens: list[int]) -> str:
        text: str = self._tokenizer.decode(tokens, skip_special_tokens=True)
        return text
