"""How a worker finds its model at a daemon; needs no torch."""

import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from expertd.errors import InvalidInputError, NotFoundError
from expertd.greeting import MAX_SOCKET_PATH_BYTES
from expertd.handshake import ATTACH_SOCKET
from expertd_client import Client, Session

DEFAULT_SOCKET = Path("/run/expertd")
DEFAULT_REATTACH_SECONDS = 30.0


@dataclass(frozen=True)
class ModelAttachment:
    """A session for one model, and the client that it needs as long as it lasts."""

    client: Client
    session: Session

    def close(self) -> None:
        """Ends both; a second call does nothing."""
        self.client.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()


def attach(name: str | None, socket: str | Path) -> ModelAttachment:
    """Attaches for the model ``name``, or without a name for the only one that is served.

    ``socket`` is the directory that the daemon serves in. Raises UnavailableError if none
    does, InvalidInputError for a path that no socket can have, and NotFoundError, saying which
    models there are, if there is no such one.
    """
    path = Path(socket).absolute() / ATTACH_SOCKET
    if len(os.fsencode(path)) > MAX_SOCKET_PATH_BYTES:
        # Before the client, whose gRPC channel would write its own lines about it to stderr.
        raise InvalidInputError(
            f"{socket} is too long a path for Unix sockets, which have "
            f"{MAX_SOCKET_PATH_BYTES} bytes at most; serve in a directory with a shorter one."
        )
    client = Client(socket)
    try:
        return ModelAttachment(client, _attach(client, name, socket))
    except BaseException:
        client.close()
        raise


def _attach(client: Client, name: str | None, socket: str | Path) -> Session:
    if name is not None:
        try:
            return client.attach(name)
        except NotFoundError:
            pass  # Said below, with the names that there are.
    names = sorted(model.name for model in client.list_models())
    if name is None and len(names) == 1:
        return client.attach(names[0])
    if not names:
        raise NotFoundError(f"The daemon in {socket} serves no model; load one first.")
    what = "several models, and none was chosen" if name is None else f"no model {name!r}"
    raise NotFoundError(f"The daemon in {socket} serves {what}; there are: {', '.join(names)}.")
