"""How a worker finds its model at a daemon; needs no torch."""

from dataclasses import dataclass
from pathlib import Path

from expertd_client import Client, Session, TlsFiles
from expertstore.closing import Closing
from expertstore.errors import NotFoundError
from expertstore.socket_directory import find_daemon

DEFAULT_REATTACH_SECONDS = 30.0


@dataclass(frozen=True)
class ModelAttachment(Closing):
    """A session for one model, and the client that it needs as long as it lasts."""

    client: Client
    session: Session

    def close(self) -> None:
        """Ends both; a second call does nothing."""
        self.client.close()


def attach(
    name: str | None,
    socket: str | Path | None = None,
    *,
    tls: TlsFiles | None = None,
    cache_bytes: int | None = None,
) -> ModelAttachment:
    """Attaches for the model ``name``, or without a name for the only one that is served.

    ``socket`` is the directory that the daemon serves in, or ``tcp://HOST:PORT`` with ``tls``;
    without it, this host's daemon is looked for as :mod:`expertstore.socket_directory` says.
    ``cache_bytes`` bounds the copies of experts where memory cannot be shared. Raises
    UnavailableError if none serves there, InvalidInputError for a path that no socket can have,
    and NotFoundError, saying which models there are, if there is no such one.
    """
    socket = find_daemon() if socket is None else socket
    client = Client(socket, tls=tls)
    try:
        return ModelAttachment(client, _attach(client, name, socket, cache_bytes))
    except BaseException:
        client.close()
        raise


def _attach(
    client: Client, name: str | None, socket: str | Path, cache_bytes: int | None
) -> Session:
    if name is not None:
        try:
            return client.attach(name, cache_bytes=cache_bytes)
        except (NotFoundError, UnicodeEncodeError):
            pass  # Said below, with the names that there are.
    names = sorted(model.name for model in client.list_models())
    if name is None and len(names) == 1:
        return client.attach(names[0], cache_bytes=cache_bytes)
    if not names:
        raise NotFoundError(f"The daemon at {socket} serves no model; load one first.")
    what = "several models, and none was chosen" if name is None else f"no model {name!r}"
    raise NotFoundError(f"The daemon at {socket} serves {what}; there are: {', '.join(names)}.")
