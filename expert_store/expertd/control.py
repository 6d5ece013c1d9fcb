"""What ``expertd stats``, ``models``, ``load`` and ``unload`` say to a running daemon."""

from pathlib import Path
from types import TracebackType
from typing import Any, Self

import grpc

from expertd.greeting import handshake
from expertd.handshake import Role, rpc_target
from expertd.plain import to_plain
from expertd.status import from_rpc_error
from expertstore.v1 import expert_store_pb2 as pb
from expertstore.v1 import expert_store_pb2_grpc as rpc

_CALL_SECONDS = 60.0


class Control:
    """A connection for administration. Raises the errors of :mod:`expertd.errors`."""

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
        self._channel.close()

    def stats(self) -> dict[str, Any]:
        """The stats contract (``docs/operating.md``), as plain values."""
        return to_plain(self._call(self._stub.GetStats, pb.GetStatsRequest()).stats)

    def models(self) -> list[dict[str, Any]]:
        """The models loaded."""
        response = self._call(self._stub.ListModels, pb.ListModelsRequest())
        return [to_plain(model) for model in response.models]

    def load(self, name: str, pack: Path) -> dict[str, Any]:
        """Opens ``pack``, an absolute path, under ``name``."""
        request = pb.LoadModelRequest(name=name, pack_path=str(pack))
        return to_plain(self._call_as_admin(self._stub.LoadModel, request).summary)

    def unload(self, name: str) -> int:
        """Drops a model; the bytes of RAM that this freed."""
        request = pb.UnloadModelRequest(name=name)
        released: int = self._call_as_admin(self._stub.UnloadModel, request).released_bytes
        return released

    def _call_as_admin(self, method: Any, request: Any) -> Any:  # noqa: ANN401
        with handshake(self._directory, Role.ADMIN, "", _CALL_SECONDS) as greeting:
            return self._call(method, request, greeting.credentials)

    def _call(self, method: Any, request: Any, metadata: tuple[tuple[str, str], ...] = ()) -> Any:  # noqa: ANN401
        try:
            return method(request, timeout=_CALL_SECONDS, metadata=metadata)
        except grpc.RpcError as error:
            raise from_rpc_error(error, str(self._directory)) from None
