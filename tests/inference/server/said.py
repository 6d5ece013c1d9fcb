"""Answers in the place of a model's, for what interfaces make of them."""

from collections.abc import AsyncGenerator
from types import SimpleNamespace
from typing import Any

from expertd_inference.engine.stops import FinishReason
from expertd_inference.engine.token import Token
from expertd_inference.server.api.continuing import Counter
from expertd_inference.server.api.sse import stream_events
from expertd_inference.server.chat.answer import Piece


class Said:
    """An Answering of these pieces; then it fails if there is an ``error``."""

    def __init__(self, *pieces: Piece, error: Exception | None = None) -> None:
        self.entry = SimpleNamespace(name="model", hosted=SimpleNamespace(ready=_ready))
        self.counter = Counter([[1, 2]])
        self.finish_reason = FinishReason.STOP
        self.stop = None
        self.temperature = 1.0
        self._pieces = pieces
        self._error = error

    async def pieces(self, _: str) -> AsyncGenerator[tuple[Token, Piece]]:
        for piece in self._pieces:
            token = Token(1, "")
            self.counter.count(token)
            yield token, piece
        if self._error is not None:
            raise self._error


async def streamed(events: AsyncGenerator[bytes], on_error: Any, *form: Any) -> list[str]:
    """The lines that a client gets."""
    response = await stream_events(events, on_error, *form)
    return b"".join([bytes(part) async for part in response.body_iterator]).decode().splitlines()  # type: ignore[arg-type]


async def _ready() -> None:
    pass
