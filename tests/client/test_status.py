"""Exceptions to status codes and back, over a real gRPC server and by hand."""

from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import grpc.aio
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertstore import errors, status
from expertstore.shared.handshake import ERROR_DETAIL_KEY, Refusal
from expertstore.v1 import expert_store_pb2 as pb
from expertstore.v1 import expert_store_pb2_grpc as rpc

CASES: list[tuple[errors.ExpertdError, str]] = [
    (errors.InvalidInputError("say it otherwise"), "INVALID_ARGUMENT"),
    (errors.ConfigError("no such setting"), "INVALID_ARGUMENT"),
    (errors.ShortMemoryError("too little is free"), "INVALID_ARGUMENT"),
    (errors.CheckpointError("no weights"), "INVALID_ARGUMENT"),
    (errors.PackError("/p has no pack.json"), "FAILED_PRECONDITION"),
    (errors.TraceError("/t.csv, line 3: no number."), "INVALID_ARGUMENT"),
    (errors.NotFoundError("no model m"), "NOT_FOUND"),
    (errors.PreconditionError("m is being unloaded"), "FAILED_PRECONDITION"),
    (
        errors.CapacityError("too many", requested=9, available=4, unit="records"),
        "RESOURCE_EXHAUSTED",
    ),
    (errors.RecordLostError("damaged", experts=[(1, 2), (3, 4)]), "DATA_LOSS"),
    (errors.UnavailableError("draining"), "UNAVAILABLE"),
    (errors.IncarnationError("restarted"), "ABORTED"),
    (errors.SessionLostError("cut off"), "ABORTED"),
    (errors.UnauthenticatedError("no token"), "UNAUTHENTICATED"),
    (errors.PermissionDeniedError("not yours"), "PERMISSION_DENIED"),
    (errors.DeadlineError("too slow"), "DEADLINE_EXCEEDED"),
    (errors.ExpertdError("something"), "INTERNAL"),
]


class Failing(rpc.ExpertStoreServicer):
    """Fails each call with ``error``."""

    error: BaseException = errors.ExpertdError("unset")

    def ListModels(self, request, context):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201, N802
        answer = status.to_status(self.error)
        context.set_trailing_metadata(answer.trailing_metadata)
        context.abort(answer.code, answer.message)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Failing, str]]:
    path = tmp_path_factory.mktemp("rpc") / "s"
    servicer = Failing()  # type: ignore[abstract]
    server = grpc.server(ThreadPoolExecutor(1))
    rpc.add_ExpertStoreServicer_to_server(servicer, server)
    server.add_insecure_port(f"unix:{path}")
    server.start()
    yield servicer, f"unix:{path}"
    server.stop(None).wait()


@pytest.fixture
def stub(server: tuple[Failing, str]) -> Iterator[rpc.ExpertStoreStub]:
    with grpc.insecure_channel(server[1]) as channel:
        yield rpc.ExpertStoreStub(channel)


@pytest.fixture
async def aio_stub(server: tuple[Failing, str]) -> AsyncIterator[rpc.ExpertStoreStub]:
    async with grpc.aio.insecure_channel(server[1]) as channel:
        yield rpc.ExpertStoreStub(channel)


@pytest.mark.parametrize(("error", "code"), CASES, ids=lambda case: type(case).__name__)
def test_round_trip(
    error: errors.ExpertdError, code: str, server: tuple[Failing, str], stub: rpc.ExpertStoreStub
) -> None:
    server[0].error = error
    with pytest.raises(grpc.RpcError) as raised:
        stub.ListModels(pb.ListModelsRequest())
    assert raised.value.code().name == code
    back = status.from_rpc_error(raised.value, "S")
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))


@pytest.mark.parametrize(("error", "code"), CASES, ids=lambda case: type(case).__name__)
async def test_round_trip_aio(
    error: errors.ExpertdError,
    code: str,
    server: tuple[Failing, str],
    aio_stub: rpc.ExpertStoreStub,
) -> None:
    server[0].error = error
    with pytest.raises(grpc.RpcError) as raised:
        await aio_stub.ListModels(pb.ListModelsRequest())  # type: ignore[misc]
    assert raised.value.code().name == code
    back = status.from_rpc_error(raised.value, "S")
    assert (type(back), str(back), vars(back)) == (type(error), str(error), vars(error))


def test_every_exception_has_a_code() -> None:
    def below(kind: type[errors.ExpertdError]) -> set[type[errors.ExpertdError]]:
        return {kind}.union(*(below(child) for child in kind.__subclasses__()))

    named = {kind for kind in vars(errors).values() if isinstance(kind, type)}
    of_a_worker = {
        errors.AdapterError,
        errors.BusyError,
        errors.PromptTooLongError,
        errors.ScoresError,
        errors.SequenceFailedError,
        errors.SettingError,
        errors.StepFailedError,
    }
    by_rpc = below(errors.ExpertdError) - below(errors.DeviceError) - of_a_worker
    assert {type(error) for error, _ in CASES} == by_rpc & named


def test_bug_is_internal_and_says_nothing(
    server: tuple[Failing, str], stub: rpc.ExpertStoreStub
) -> None:
    server[0].error = KeyError("the token of another session")
    with pytest.raises(grpc.RpcError) as raised:
        stub.ListModels(pb.ListModelsRequest())
    assert raised.value.code() is grpc.StatusCode.INTERNAL
    back = status.from_rpc_error(raised.value, "S")
    assert type(back) is errors.ExpertdError
    assert "token" not in str(back)


def test_subclass_travels_as_its_base() -> None:
    class Narrower(errors.NotFoundError):
        pass

    answer = status.to_status(Narrower("gone"))
    assert answer.code is grpc.StatusCode.NOT_FOUND
    assert pb.ErrorDetail.FromString(answer.trailing_metadata[0][1]).kind == "NotFoundError"


@pytest.mark.parametrize(
    "message", ["x" * 100_000, "ä%\n" * 50_000, "\U0001f600" * 9_000, "\ud800" * 9000]
)
def test_huge_error_gets_through(
    message: str, server: tuple[Failing, str], stub: rpc.ExpertStoreStub
) -> None:
    server[0].error = errors.RecordLostError(message, experts=[(9999, i) for i in range(5000)])
    with pytest.raises(grpc.RpcError) as raised:
        stub.ListModels(pb.ListModelsRequest())
    back = status.from_rpc_error(raised.value, "S")
    assert isinstance(back, errors.RecordLostError)
    assert str(back).endswith("...")
    assert back.experts == tuple((9999, i) for i in range(status.MAX_DETAIL_EXPERTS))


def test_nobody_there(tmp_path: Path) -> None:
    with (
        grpc.insecure_channel(f"unix:{tmp_path}/none") as channel,
        pytest.raises(grpc.RpcError) as raised,
    ):
        rpc.ExpertStoreStub(channel).ListModels(pb.ListModelsRequest())
    back = status.from_rpc_error(raised.value, "/run/x")
    assert type(back) is errors.UnavailableError
    assert str(back) == "No expertd answers at /run/x; is it running?"
    found = errors.PermissionDeniedError("You may not.")
    assert status.from_rpc_error(raised.value, "/run/x", lambda: found) is found


class Made(grpc.RpcError):
    """A status from anywhere: what a newer, older or foreign server may send."""

    def __init__(self, code: grpc.StatusCode, detail: bytes | None) -> None:
        super().__init__()
        self._code, self._detail = code, detail

    def code(self) -> grpc.StatusCode:
        return self._code

    def details(self) -> str:
        return "text"

    def trailing_metadata(self):  # type: ignore[no-untyped-def]  # noqa: ANN201
        return ((ERROR_DETAIL_KEY, self._detail),) if self._detail is not None else None


@given(code=st.sampled_from(list(grpc.StatusCode)), detail=st.none() | st.binary(max_size=40))
@settings(max_examples=150)
def test_foreign_status_is_typed(code: grpc.StatusCode, detail: bytes | None) -> None:
    back = status.from_rpc_error(Made(code, detail), "S")
    assert isinstance(back, errors.ExpertdError)
    assert str(back)


def test_kind_that_contradicts_the_code_is_ignored() -> None:
    detail = pb.ErrorDetail(kind="RecordLostError").SerializeToString()
    back = status.from_rpc_error(Made(grpc.StatusCode.NOT_FOUND, detail), "S")
    assert type(back) is errors.NotFoundError


@pytest.mark.parametrize(("error", "code"), CASES, ids=lambda case: type(case).__name__)
def test_refusal(error: errors.ExpertdError, code: str) -> None:
    refusal = status.to_refusal(error)
    assert refusal == Refusal(code, str(error))
    back = status.from_refusal(refusal)
    assert status.to_status(back).code is status.to_status(error).code
    assert str(back) == str(error)


def test_refusal_of_unknown_code() -> None:
    assert type(status.from_refusal(Refusal("NEWER", "no"))) is errors.ExpertdError
