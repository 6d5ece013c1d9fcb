"""Accesses of a model's sessions, as they happen."""

from collections.abc import Callable, Iterator
from typing import Any

import grpc

from expertstore.errors import ExpertdError
from expertstore.v1 import expert_store_pb2 as pb


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
