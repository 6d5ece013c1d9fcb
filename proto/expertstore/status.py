"""The one place where exceptions and gRPC status codes become each other.

The daemon's service edge calls :func:`to_status`; clients call :func:`from_rpc_error`
and, for the attach socket, :func:`from_refusal`. Several exceptions share a code, so the
exception's own name travels beside it, in an ``ErrorDetail`` message in the trailing
metadata. That message is also the mark by which a client knows a status that the daemon
gave from one that gRPC made up on the way (a lost connection, a deadline).
"""

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import grpc
from google.protobuf.message import DecodeError

from expertstore.errors import (
    CapacityError,
    CheckpointError,
    ConfigError,
    DeadlineError,
    ExpertdError,
    IncarnationError,
    InvalidInputError,
    NotFoundError,
    PackError,
    PermissionDeniedError,
    PreconditionError,
    RecordLostError,
    SessionLostError,
    ShortMemoryError,
    TraceError,
    UnauthenticatedError,
    UnavailableError,
)
from expertstore.shared.handshake import ERROR_DETAIL_KEY, Refusal
from expertstore.v1 import expert_store_pb2 as pb

# gRPC's metadata of one response may take 8 KiB in all by default, and a non-ASCII
# character takes up to twelve bytes of it. An error must get through, if need be cut short.
MAX_MESSAGE_BYTES = 4096
MAX_DETAIL_EXPERTS = 128

INTERNAL_MESSAGE = "expertd failed in a way it should not; its log says where."

_CODES: dict[type[ExpertdError], grpc.StatusCode] = {
    InvalidInputError: grpc.StatusCode.INVALID_ARGUMENT,
    ConfigError: grpc.StatusCode.INVALID_ARGUMENT,
    ShortMemoryError: grpc.StatusCode.INVALID_ARGUMENT,
    CheckpointError: grpc.StatusCode.INVALID_ARGUMENT,
    # The request is sound; what it points at has to be repaired first.
    PackError: grpc.StatusCode.FAILED_PRECONDITION,
    TraceError: grpc.StatusCode.INVALID_ARGUMENT,
    NotFoundError: grpc.StatusCode.NOT_FOUND,
    PreconditionError: grpc.StatusCode.FAILED_PRECONDITION,
    CapacityError: grpc.StatusCode.RESOURCE_EXHAUSTED,
    RecordLostError: grpc.StatusCode.DATA_LOSS,
    UnavailableError: grpc.StatusCode.UNAVAILABLE,
    IncarnationError: grpc.StatusCode.ABORTED,
    SessionLostError: grpc.StatusCode.ABORTED,
    UnauthenticatedError: grpc.StatusCode.UNAUTHENTICATED,
    PermissionDeniedError: grpc.StatusCode.PERMISSION_DENIED,
    DeadlineError: grpc.StatusCode.DEADLINE_EXCEEDED,
    ExpertdError: grpc.StatusCode.INTERNAL,
}
CODE_NAMES = tuple(sorted({code.name for code in _CODES.values()}))
"""All that a call may be answered with, beside OK."""
_KINDS = {kind.__name__: kind for kind in _CODES}
# What a code means where no detail says it more exactly.
_DEFAULTS: dict[grpc.StatusCode, type[ExpertdError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidInputError,
    grpc.StatusCode.NOT_FOUND: NotFoundError,
    grpc.StatusCode.FAILED_PRECONDITION: PreconditionError,
    grpc.StatusCode.RESOURCE_EXHAUSTED: CapacityError,
    grpc.StatusCode.DATA_LOSS: RecordLostError,
    grpc.StatusCode.UNAVAILABLE: UnavailableError,
    grpc.StatusCode.ABORTED: IncarnationError,
    grpc.StatusCode.UNAUTHENTICATED: UnauthenticatedError,
    grpc.StatusCode.PERMISSION_DENIED: PermissionDeniedError,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineError,
    # gRPC's own: the server went down beneath the call, and does not know the call.
    grpc.StatusCode.CANCELLED: UnavailableError,
    grpc.StatusCode.UNIMPLEMENTED: PreconditionError,
}


class Status(NamedTuple):
    """What an RPC is aborted with."""

    code: grpc.StatusCode
    message: str
    trailing_metadata: tuple[tuple[str, bytes], ...]


def to_status(error: BaseException) -> Status:
    """How the daemon answers a call that failed with ``error``.

    The text of an exception that is not ours stays in the daemon: it may hold anything.
    """
    if not isinstance(error, ExpertdError):
        detail = pb.ErrorDetail(kind=ExpertdError.__name__)
        return Status(grpc.StatusCode.INTERNAL, INTERNAL_MESSAGE, _metadata(detail))
    kind = next(kind for kind in type(error).__mro__ if kind in _CODES)
    detail = pb.ErrorDetail(kind=kind.__name__)
    if isinstance(error, CapacityError):
        detail.shortfall.requested = error.requested
        detail.shortfall.available = error.available
        detail.shortfall.unit = error.unit
    if isinstance(error, RecordLostError):
        for layer, expert in error.experts[:MAX_DETAIL_EXPERTS]:
            detail.experts.add(layer=layer, expert=expert)
    return Status(_CODES[kind], _shorten(str(error)), _metadata(detail))


def to_refusal(error: BaseException) -> Refusal:
    """How the daemon's attach socket answers a worker that it refuses with ``error``."""
    status = to_status(error)
    return Refusal(code=status.code.name, message=status.message)


def from_rpc_error(
    error: grpc.RpcError, where: str, explain: Callable[[], ExpertdError | None] = lambda: None
) -> ExpertdError:
    """The exception that the call which failed with ``error`` raises.

    ``where`` names the daemon's socket, for the messages about statuses that gRPC itself
    gave, whose own text speaks of channels and subchannels; ``explain`` finds out why no
    daemon is there.
    """
    # Every RpcError that a call raises is also its grpc.Call (grpc.aio: its equal).
    code: grpc.StatusCode = error.code()
    detail = _detail_of(error)
    if detail is not None:
        return _make(code, error.details() or code.name, detail)
    if code is grpc.StatusCode.UNAVAILABLE or code is grpc.StatusCode.CANCELLED:
        return explain() or UnavailableError(f"No expertd answers at {where}; is it running?")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return DeadlineError(f"The expertd at {where} did not answer in the time given.")
    if code is grpc.StatusCode.UNIMPLEMENTED:
        return PreconditionError(
            f"The expertd at {where} does not know this call; run the same version on both sides."
        )
    message = f"The call to the expertd at {where} failed: {error.details() or code.name}"
    return _make(code, message, pb.ErrorDetail())


def from_refusal(refusal: Refusal) -> ExpertdError:
    """The exception that an attach which was answered with ``refusal`` raises."""
    try:
        code = grpc.StatusCode[refusal.code]
    except KeyError:
        code = grpc.StatusCode.UNKNOWN
    shortfall = pb.Shortfall(requested=1, available=0, unit="sessions")
    return _make(code, refusal.message, pb.ErrorDetail(shortfall=shortfall))


def _make(code: grpc.StatusCode, message: str, detail: pb.ErrorDetail) -> ExpertdError:
    kind = _KINDS.get(detail.kind)
    if kind is None or _CODES[kind] is not code:
        kind = _DEFAULTS.get(code, ExpertdError)
    if issubclass(kind, CapacityError):
        shortfall = detail.shortfall
        return kind(
            message,
            requested=shortfall.requested,
            available=shortfall.available,
            unit=shortfall.unit or "calls",
        )
    if issubclass(kind, RecordLostError):
        return kind(message, experts=[(expert.layer, expert.expert) for expert in detail.experts])
    return kind(message)


def _detail_of(error: grpc.RpcError) -> pb.ErrorDetail | None:
    # A tuple of pairs from grpc, a Metadata of pairs from grpc.aio; the stubs know neither.
    pairs = cast("Iterable[tuple[str, bytes]]", error.trailing_metadata() or ())
    for key, value in pairs:
        if key == ERROR_DETAIL_KEY:
            try:
                return pb.ErrorDetail.FromString(value)
            except DecodeError:
                return None
    return None


def _metadata(detail: pb.ErrorDetail) -> tuple[tuple[str, bytes], ...]:
    return ((ERROR_DETAIL_KEY, detail.SerializeToString()),)


def _shorten(message: str) -> str:
    """``message`` within what metadata holds, which gRPC percent-encodes."""
    # A path that is no UTF-8 comes with surrogates, which no encoder takes.
    message = message.encode(errors="replace").decode()
    size = 0
    for index, char in enumerate(message):
        # Printable ASCII stands for itself, each other byte is written as three.
        size += 1 if " " <= char <= "~" and char != "%" else 3 * len(char.encode())
        if size > MAX_MESSAGE_BYTES - 3:
            return message[:index] + "..."
    return message
