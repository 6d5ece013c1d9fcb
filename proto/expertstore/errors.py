"""The exceptions of expertd, raised by the daemon, the packer and the client alike.

::

    ExpertdError                 base of every failure that a caller may expect
    ├── InvalidInputError        the request or argument itself is wrong
    │   ├── ConfigError          a setting of the daemon
    │   │   └── ShortMemoryError  the budget is more than is free just now: retry
    │   ├── CheckpointError      what was to be packed is not a usable checkpoint
    │   ├── PackError            what was to be served is not a usable pack
    │   ├── AdapterError         what was to be added to a model is not a usable adapter of it
    │   ├── TraceError           what was to be replayed is not a usable trace
    │   ├── SettingError         a setting of a generation
    │   └── PromptTooLongError   more tokens than the model's context or a worker's memory takes
    ├── NotFoundError            no such model, or no such expert in it
    ├── PreconditionError        possible in another state: fix that first
    │   └── ScoresError          a model's scores for the next token say nothing
    ├── CapacityError            more than the budget or quota holds
    ├── RecordLostError          a record is damaged, truncated or unreadable
    ├── UnavailableError         no daemon answers: retry
    ├── IncarnationError         the daemon was restarted: attach again
    ├── SessionLostError         the session was cut off: attach again, redo the step
    ├── UnauthenticatedError     no session, or a token that is none
    ├── PermissionDeniedError    this user may not do that
    ├── DeadlineError            not done in the time given
    ├── BusyError                too many requests wait for a worker's engine already: retry later
    ├── StepFailedError          a step of a worker's engine failed in an unforeseen way
    └── DeviceError              a worker's own GPU failed it; never by RPC
        ├── DeviceLostError      it does not answer any more
        └── DeviceMemoryError    its memory is full

Each message is one sentence that says what, where, and what to do. Anything else
that escapes is a bug of ours. Status codes stand in :mod:`expertstore.status`.
"""

from collections.abc import Sequence


class ExpertdError(Exception):
    """Base of all expected failures."""


class InvalidInputError(ExpertdError):
    """The request or argument itself is wrong."""


class ConfigError(InvalidInputError):
    """A setting of the daemon is wrong."""


class ShortMemoryError(ConfigError):
    """The host has the memory that the budget asks for, but not free: retrying may help."""


class CheckpointError(InvalidInputError):
    """What was to be packed is not a usable checkpoint."""


class PackError(InvalidInputError):
    """What was to be served is not a usable pack."""


class AdapterError(InvalidInputError):
    """What was to be added to a model is not a usable adapter of it."""


class TraceError(InvalidInputError):
    """What was to be replayed is not a usable trace, or one cannot be written."""


class SettingError(InvalidInputError):
    """``setting``, a field of GenerationSettings, is wrong; the message begins with its name."""

    def __init__(self, message: str, *, setting: str) -> None:
        super().__init__(message)
        self.setting = setting


class PromptTooLongError(InvalidInputError):
    """A prompt has ``num_tokens``, and ``limit`` is the most that can be continued."""

    def __init__(self, message: str, *, num_tokens: int, limit: int) -> None:
        super().__init__(message)
        self.num_tokens = num_tokens
        self.limit = limit


class NotFoundError(ExpertdError):
    """No such model, or no such expert in it."""


class PreconditionError(ExpertdError):
    """Possible in another state; the message says which."""


class ScoresError(PreconditionError):
    """A model's scores for the next token are no numbers, or cannot be processed. Never by RPC."""


class CapacityError(ExpertdError):
    """More was asked for than the budget or quota holds.

    ``requested`` and ``available`` are counted in ``unit`` (``"records"`` or ``"bytes"``).
    """

    def __init__(self, message: str, *, requested: int, available: int, unit: str) -> None:
        super().__init__(message)
        self.requested = requested
        self.available = available
        self.unit = unit


class RecordLostError(ExpertdError):
    """A record is damaged, truncated or unreadable; ``experts`` are (layer, expert) pairs."""

    def __init__(self, message: str, *, experts: Sequence[tuple[int, int]]) -> None:
        super().__init__(message)
        self.experts = tuple(experts)


class UnavailableError(ExpertdError):
    """No daemon answers; retrying may help."""


class IncarnationError(ExpertdError):
    """The daemon was restarted since the session attached; attach again."""


class SessionLostError(ExpertdError):
    """The session was cut off; what it read since its last release must be read again."""


class UnauthenticatedError(ExpertdError):
    """No session token, or one that this daemon did not issue."""


class PermissionDeniedError(ExpertdError):
    """This user or session may not do that."""


class DeadlineError(ExpertdError):
    """Not done in the time given."""


class BusyError(ExpertdError):
    """Too many requests wait for a worker's engine already; retry later. Never by RPC."""


class StepFailedError(ExpertdError):
    """A step of a worker's engine failed in an unforeseen way: ``__cause__``. Never by RPC."""


class SequenceFailedError(StepFailedError):
    """One sequence failed in an unforeseen way while others of its step did not. Never by RPC."""


class DeviceError(ExpertdError):
    """A worker's own device failed it; other workers and the daemon do not notice."""


class DeviceLostError(DeviceError):
    """The device does not answer any more: this process cannot use it again."""


class DeviceMemoryError(DeviceError):
    """The device's memory is full; the message says what to make smaller."""
