"""What the front and an engine's process say to each other."""

from typing import Any

import msgspec

from expertd_inference.engine.sequence import Origin
from expertd_inference.engine.stats import EngineStats
from expertd_inference.engine.token import Token
from expertd_inference.settings import GenerationSettings
from expertstore import errors
from expertstore.errors import ExpertdError, PromptTooLongError, SettingError, StepFailedError

PULSE_SECONDS = 5.0


class Message(msgspec.Struct, frozen=True, array_like=True, tag=True):
    """One of the below."""


class Begin(Message, frozen=True):
    """To the engine: continue ``tokens``, or go on after what ``origin`` has of it already."""

    id: int
    tokens: list[int]
    settings: GenerationSettings
    origin: Origin
    images: tuple[bytes, ...] = ()
    """The files of those that ``tokens`` have one place each for."""


class Cancel(Message, frozen=True):
    """To the engine: nobody wants sequence ``id`` any more."""

    id: int


class Failure(msgspec.Struct, frozen=True, array_like=True):
    """An error on its way to another process; ``kind`` is its class's name.

    ``refuses`` says that the engine did not begin the sequence, and computes others.
    """

    kind: str
    message: str
    arguments: dict[str, int | str] = {}
    refuses: bool = False

    @classmethod
    def of(cls, error: BaseException) -> "Failure":
        """Of an expected failure; any other is a StepFailedError."""
        if isinstance(error, PromptTooLongError):
            arguments: dict[str, int | str] = {"num_tokens": error.num_tokens, "limit": error.limit}
            return cls("PromptTooLongError", str(error), arguments)
        if isinstance(error, SettingError):
            return cls("SettingError", str(error), {"setting": error.setting})
        known = isinstance(error, ExpertdError)
        return cls(type(error).__name__ if known else "StepFailedError", str(error))

    def error(self) -> ExpertdError:
        """The error again."""
        kind: Any = getattr(errors, self.kind, StepFailedError)
        try:
            error: ExpertdError = kind(self.message, **self.arguments)
        except TypeError:  # of a kind that says more than its message
            error = StepFailedError(self.message)
        return error


class Ready(Message, frozen=True):
    """From the engine: the model is loaded.

    ``max_tokens`` is the longest sequence that its context and its KV memory take.
    """

    executor: str
    reason: str
    kernels: str
    vocabulary: int
    max_tokens: int
    stats: EngineStats


class Refused(Message, frozen=True):
    """From the engine, as its last words: the model cannot be loaded."""

    failure: Failure


class Progress(Message, frozen=True):
    """From the engine: what came of one step, for all sequences."""

    tokens: list[tuple[int, Token]]
    ended: list[tuple[int, Failure | None]]
    stats: EngineStats | None = None


class Pulse(Message, frozen=True):
    """From the engine, every :data:`PULSE_SECONDS` from its start on: the process runs."""


ToEngine = Begin | Cancel
FromEngine = Ready | Refused | Progress | Pulse
