"""How a worker finds its model's session; needs no torch."""

from pathlib import Path

from expertd.errors import NotFoundError
from expertd_client import Client, Session

DEFAULT_SOCKET = Path("/run/expertd")
DEFAULT_REATTACH_SECONDS = 30.0


def attach(name: str | None, socket: str | Path) -> Session:
    """A session for the model ``name``, or without a name for the only one that is served.

    ``socket`` is the directory that the daemon serves in. Raises UnavailableError if none
    does, NotFoundError, saying which models there are, if there is no such one.
    """
    with Client(socket) as client:
        if name is not None:
            try:
                return client.attach(name)
            except NotFoundError:
                pass
        names = sorted(model.name for model in client.list_models())
        if name is None and len(names) == 1:
            return client.attach(names[0])
    if not names:
        raise NotFoundError(f"The daemon in {socket} serves no model; load one first.")
    what = f"no model {name!r}" if name is not None else "several models, and none was chosen"
    raise NotFoundError(f"The daemon in {socket} serves {what}; there are: {', '.join(names)}.")
