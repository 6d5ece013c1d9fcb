"""How a worker finds its model at a daemon; needs no torch."""

from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from expertd.errors import NotFoundError
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
    does, NotFoundError, saying which models there are, if there is no such one.
    """
    client = Client(socket)
    try:
        return ModelAttachment(client, client.attach(_choose(client, name, socket)))
    except BaseException:
        client.close()
        raise


def _choose(client: Client, name: str | None, socket: str | Path) -> str:
    names = sorted(model.name for model in client.list_models())
    if name in names:
        return name
    if name is None and len(names) == 1:
        return names[0]
    if not names:
        raise NotFoundError(f"The daemon in {socket} serves no model; load one first.")
    what = "several models, and none was chosen" if name is None else f"no model {name!r}"
    raise NotFoundError(f"The daemon in {socket} serves {what}; there are: {', '.join(names)}.")
