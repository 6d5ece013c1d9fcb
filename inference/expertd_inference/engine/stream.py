"""What :meth:`Engine.submit` gives: the tokens of one sequence, while they come."""

import asyncio
import weakref
from collections.abc import Callable
from types import TracebackType
from typing import Self

from expertd_inference.engine.channel import Channel
from expertd_inference.engine.stops import FinishReason
from expertd_inference.engine.token import Likely, Token


class TokenStream:
    """An iterator of :class:`Token`, for ``for`` in a thread or ``async for`` in an event loop.

    A stream has one reader. Nothing waits for a reader: tokens that are not read yet are kept,
    and they are never more than the ``max_new_tokens`` of their settings.

    The sequence is cancelled before the engine's next step, and the iteration ends, by
    :meth:`cancel`, at the end of a ``with`` block, when the wait for a token is interrupted
    (KeyboardInterrupt, a cancelled task), and when nothing refers to the stream any more.

    If the sequence fails, the iterator raises the reason, an ExpertdError, after the tokens that
    came before it; other sequences go on.
    """

    def __init__(
        self,
        channel: Channel[Token],
        cancel: Callable[[], None],
        *,
        num_prompt_tokens: int,
    ) -> None:
        """``cancel`` is safe to call at any time, even during garbage collection."""
        self._channel = channel
        self._cancel = weakref.finalize(self, cancel)
        self._cancel.atexit = False
        self.num_prompt_tokens = num_prompt_tokens
        """How many tokens the prompt has."""
        self.num_cached_tokens: int | None = None
        """How many of them were found as a prefix; None before the first new token is read."""
        self.prompt_logprobs: tuple[Likely, ...] | None = None
        """Of the prompt's tokens from the second on, once the first new token is read.

        None unless asked for by ``GenerationSettings.prompt_logprobs``.
        """
        self.finish_reason: FinishReason | None = None
        """Why the sequence ended; None before its last token is read, and if it failed."""

    def __repr__(self) -> str:
        state = self.finish_reason or ("ended" if self._channel.ended else "running")
        return (
            f"<TokenStream of {self.num_prompt_tokens} prompt tokens: {state}, "
            f"{self._channel.num_waiting} unread>"
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> Token:
        try:
            token = self._channel.receive()
        except BaseException:
            self.cancel()
            raise
        if token is None:
            raise StopIteration
        return self._received(token)

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Token:
        try:
            token = await self._channel.receive_async()
        except asyncio.CancelledError:
            self.cancel()
            raise
        if token is None:
            raise StopAsyncIteration
        return self._received(token)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.cancel()

    def cancel(self) -> None:
        """Ends the sequence and the iteration; what was not read is dropped.

        After the last token, and a second time, it does nothing.
        """
        self._cancel()
        if self.finish_reason is None:
            self._channel.end(drop=True)

    def _received(self, token: Token) -> Token:
        if token.opening is not None:
            self.num_cached_tokens = token.opening.num_cached_tokens
            self.prompt_logprobs = token.opening.prompt_logprobs
        if token.finish_reason is not None:
            self.finish_reason = token.finish_reason
            self._cancel.detach()
        return token
