"""Prompts in, whole texts out: the blocking form of the engine."""

from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TypeVar

from expertd_inference.engine.stops import FinishReason
from expertd_inference.engine.stream import TokenStream
from expertd_inference.engine.token import Likely, Token
from expertstore.errors import BusyError, InvalidInputError

Prompt = TypeVar("Prompt")


@dataclass(frozen=True, slots=True)
class Completion:
    """How one prompt, of ``num_prompt_tokens``, went on: ``tokens``, and their ``text`` together.

    ``finish_reason`` is that of the last token, ``prompt_logprobs`` are as those of a
    :class:`.TokenStream`.
    """

    text: str
    tokens: tuple[Token, ...]
    finish_reason: FinishReason | None
    num_prompt_tokens: int
    prompt_logprobs: tuple[Likely, ...] | None = None


def complete_all(
    submit: Callable[[Prompt], TokenStream], prompts: Sequence[Prompt]
) -> list[Completion]:
    """What becomes of all ``prompts``, in their order; if one fails the others are cancelled.

    Where the queue is full the next is submitted once the first is complete. Raises what
    ``submit`` and the streams raise; BusyError only where others have filled the queue.
    """
    if isinstance(prompts, str) or not isinstance(prompts, Iterable):
        raise InvalidInputError("generate takes a list of prompts; put a single one in a list.")
    prompts = list(prompts)
    if any(isinstance(one, int | Mapping) for one in prompts):
        raise InvalidInputError("generate takes a list of prompts; put a single one in a list.")
    done: list[Completion] = []
    unread: deque[TokenStream] = deque()
    with ExitStack() as undo:
        for prompt in prompts:
            stream = None
            while stream is None:
                try:
                    stream = undo.enter_context(submit(prompt))
                except BusyError:
                    if not unread:
                        raise
                    done.append(_read(unread.popleft()))
            unread.append(stream)
        return done + [_read(stream) for stream in unread]


def _read(stream: TokenStream) -> Completion:
    tokens = tuple(stream)
    return Completion(
        "".join(token.text for token in tokens),
        tokens,
        stream.finish_reason,
        stream.num_prompt_tokens,
        stream.prompt_logprobs,
    )
