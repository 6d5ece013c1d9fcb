"""Several continuations at once, as one request asks for them."""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import AsyncExitStack

import msgspec

from expertd_inference.engine.stream import TokenStream
from expertd_inference.engine.token import Token


class PromptTokensDetails(msgspec.Struct):
    """Of a prompt."""

    cached_tokens: int = 0


class CompletionTokensDetails(msgspec.Struct):
    """Of an answer."""

    reasoning_tokens: int = 0


class Usage(msgspec.Struct):
    """What a request took, in tokens, as OpenAI counts them."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails
    completion_tokens_details: CompletionTokensDetails


class Counter:
    """Counts the tokens of one request, whose prompts are each computed once."""

    def __init__(self, prompts: Sequence[Sequence[int]]) -> None:
        self.num_prompt_tokens = sum(map(len, prompts))
        self.num_new_tokens = 0
        self.num_cached_tokens = 0
        self.num_reasoning_tokens = 0
        self._num_sent = self.num_prompt_tokens

    def count(self, token: Token) -> None:
        """One more."""
        self.num_new_tokens += 1
        if token.opening is not None:
            # The same for each continuation of a prompt.
            self.num_prompt_tokens = self._num_sent + token.opening.num_image_tokens
            cached = self.num_cached_tokens + token.opening.num_cached_tokens
            self.num_cached_tokens = min(cached, self.num_prompt_tokens)

    @property
    def usage(self) -> Usage:
        """Until now."""
        return Usage(
            self.num_prompt_tokens,
            self.num_new_tokens,
            self.num_prompt_tokens + self.num_new_tokens,
            PromptTokensDetails(self.num_cached_tokens),
            CompletionTokensDetails(self.num_reasoning_tokens),
        )


async def read_all(streams: Sequence[TokenStream]) -> list[list[Token]]:
    """The tokens of each, when all are complete. If one fails the others are cancelled."""
    async with AsyncExitStack() as stack:
        for stream in streams:
            await stack.enter_async_context(stream)
        return [[token async for token in stream] for stream in streams]


async def interleaved(streams: Sequence[TokenStream]) -> AsyncGenerator[tuple[int, Token]]:
    """Tokens as they come, each with its stream's number; all are cancelled when it is closed."""
    if len(streams) == 1:
        async with streams[0]:
            async for token in streams[0]:
                yield 0, token
        return
    queue: asyncio.Queue[tuple[int, Token | BaseException | None]] = asyncio.Queue()

    async def pass_on(number: int, stream: TokenStream) -> None:
        try:
            async for token in stream:
                queue.put_nowait((number, token))
            queue.put_nowait((number, None))
        except Exception as error:
            queue.put_nowait((number, error))

    async with AsyncExitStack() as stack:
        for stream in streams:
            await stack.enter_async_context(stream)
        tasks = [asyncio.create_task(pass_on(*each)) for each in enumerate(streams)]
        try:
            num_open = len(tasks)
            while num_open:
                number, item = await queue.get()
                if item is None:
                    num_open -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    yield number, item
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
