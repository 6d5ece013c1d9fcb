"""What ``expertd stats``, ``top``, ``load``, ``record`` and their like say to a running daemon."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from expertd.settings.disk_io import DiskIo
from expertd.settings.limits import NO_LIMITS, Limits
from expertstore.errors import ExpertdError
from expertstore.pack.files import check_path
from expertstore.plain import to_plain
from expertstore.shared.greeting import handshake
from expertstore.shared.handshake import Role, rpc_target
from expertstore.shared.unreachable import explain
from expertstore.status import from_rpc_error
from expertstore.v1 import expert_store_pb2 as pb
from expertstore.v1 import expert_store_pb2_grpc as rpc

if TYPE_CHECKING:
    from expertd.residency.heat_map import HeatMap

_CALL_SECONDS = 60.0
_HEALTH_SECONDS = 5.0


class TouchStream:
    """Iterates over accesses. Ends when it is stopped, when its time is over, or the model goes."""

    def __init__(
        self,
        call: Any,  # noqa: ANN401 - grpc's, and generic
        translate: Callable[[grpc.RpcError], ExpertdError],
    ) -> None:
        self._call, self._translate = call, translate
        self._stopped = False

    def stop(self) -> None:
        """Ends the iteration; may be called by a signal handler."""
        self._stopped = True
        self._call.cancel()

    def __iter__(self) -> Iterator[pb.WatchTouchesResponse]:
        """Raises the errors of :mod:`expertstore.errors`."""
        try:
            yield from self._call
        except grpc.RpcError as error:
            # Every RpcError that a call raises is also its grpc.Call.
            if not self._stopped and error.code() is not grpc.StatusCode.DEADLINE_EXCEEDED:
                raise self._translate(error) from None


class Control:
    """A connection for administration. Raises the errors of :mod:`expertstore.errors`."""

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._channel = grpc.insecure_channel(rpc_target(directory.absolute()))
        self._stub = rpc.ExpertStoreStub(self._channel)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Hangs up, also on a call that is under way. Twice is harmless."""
        self._channel.close()

    def stats(self) -> dict[str, Any]:
        """The stats contract (``docs/operating.md``), as plain values."""
        return to_plain(self._call(self._stub.GetStats, pb.GetStatsRequest()).stats)

    def watch(self, interval_seconds: float) -> Iterator[dict[str, Any]]:
        """The stats now and then every interval; ends with an error, or when this is closed."""
        calls = self._stub.WatchStats(pb.WatchStatsRequest(interval_seconds=interval_seconds))
        try:
            for response in calls:
                yield to_plain(response.stats)
        except grpc.RpcError as error:
            raise self._error(error) from None
        finally:
            calls.cancel()

    def heat(self, model: str) -> "HeatMap":
        """How hot the model's experts are, and which are resident."""
        from expertd.residency.heat_map import HeatMap  # numpy: half the time of `expertd stats`

        return HeatMap.of(self._call(self._stub.GetHeat, pb.GetHeatRequest(model=model)))

    def models(self) -> list[dict[str, Any]]:
        """The models loaded."""
        response = self._call(self._stub.ListModels, pb.ListModelsRequest())
        return [to_plain(model) for model in response.models]

    def serves(self) -> bool:
        """Whether the daemon says that it serves, by grpc.health.v1."""
        check = health_pb2_grpc.HealthStub(self._channel).Check
        request = health_pb2.HealthCheckRequest()
        response = self._call(check, request, timeout_seconds=_HEALTH_SECONDS)
        return bool(response.status == health_pb2.HealthCheckResponse.SERVING)

    def model(self, name: str) -> pb.GetModelResponse:
        """One model, with its layers."""
        response: pb.GetModelResponse = self._call(
            self._stub.GetModel, pb.GetModelRequest(name=name)
        )
        return response

    @contextmanager
    def touches(self, name: str, timeout_seconds: float | None) -> Iterator["TouchStream"]:
        """What the sessions of a model use from now on, for so long or until it is stopped."""
        with handshake(self._directory, Role.ADMIN, "", _CALL_SECONDS) as greeting:
            call = self._stub.WatchTouches(
                pb.WatchTouchesRequest(model=name),
                timeout=timeout_seconds,
                metadata=greeting.credentials,
            )
            try:
                call.initial_metadata()  # there when the daemon has begun
                yield TouchStream(call, self._error)
            finally:
                call.cancel()

    def load(
        self,
        name: str,
        pack: Path,
        limits: Limits = NO_LIMITS,
        disk_io: DiskIo | None = None,
    ) -> dict[str, Any]:
        """Opens ``pack``, an absolute path, under ``name``. Raises ``PackError`` and others."""
        check_path(pack)
        request = pb.LoadModelRequest(
            name=name,
            pack_path=str(pack),
            min_bytes=limits.min_bytes,
            max_bytes=limits.max_bytes or 0,
            pins=limits.pins,
            disk_io=disk_io or "",
        )
        return to_plain(self._call_as_admin(self._stub.LoadModel, request).summary)

    def limit(self, name: str, min_bytes: int | None, max_bytes: int | None) -> dict[str, Any]:
        """Changes limits; None: as it is, a maximum of 0: none."""
        request = pb.SetLimitsRequest(name=name, min_bytes=min_bytes, max_bytes=max_bytes)
        return to_plain(self._call_as_admin(self._stub.SetLimits, request).summary)

    def unload(self, name: str) -> int:
        """Drops a model; the bytes of RAM that this freed."""
        request = pb.UnloadModelRequest(name=name)
        released: int = self._call_as_admin(self._stub.UnloadModel, request).released_bytes
        return released

    def _call_as_admin(self, method: Any, request: Any) -> Any:  # noqa: ANN401
        with handshake(self._directory, Role.ADMIN, "", _CALL_SECONDS) as greeting:
            return self._call(method, request, greeting.credentials)

    def _call(
        self,
        method: Any,  # noqa: ANN401
        request: Any,  # noqa: ANN401
        metadata: tuple[tuple[str, str], ...] = (),
        timeout_seconds: float = _CALL_SECONDS,
    ) -> Any:  # noqa: ANN401
        try:
            return method(request, timeout=timeout_seconds, metadata=metadata)
        except grpc.RpcError as error:
            raise self._error(error) from None

    def _error(self, error: grpc.RpcError) -> ExpertdError:
        return from_rpc_error(error, str(self._directory), partial(explain, self._directory))
