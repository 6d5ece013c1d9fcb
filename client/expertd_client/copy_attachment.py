"""A session's tie to a daemon whose memory it does not share: records come as copies."""

import socket
from collections.abc import Sequence
from contextlib import suppress

from expertd_client.attachment import abandon_in_child
from expertd_client.endpoint import Metadata
from expertd_client.record_cache import RecordCache
from expertstore.shared.greeting import Greeting
from expertstore.shared.handshake import INCARNATION_KEY


class CopyAttachment:
    """What a worker has of the daemon: a cache to fill, and a right to read.

    On the daemon's host that right is a reader's session, and its connection the lease of it
    (``greeting``). By TCP it is the certificate, and there is neither session nor connection:
    that the daemon has gone is learned from the first read that fails.
    """

    shares_memory = False

    def __init__(self, cache: RecordCache, incarnation: str, greeting: Greeting | None) -> None:
        """Takes over the greeting's connection."""
        self.mapping = cache
        self.incarnation = incarnation
        self.id = 0
        self.credentials: Metadata = ((INCARNATION_KEY, incarnation),)
        self._connected = True
        self._connection: socket.socket | None = None
        if greeting is not None:
            self.id = greeting.welcome.session
            self.incarnation = greeting.welcome.incarnation
            self.credentials = greeting.credentials
            self._connection = greeting.take_connection()
        abandon_in_child(self)

    def __repr__(self) -> str:
        state = "connected" if self._connected else "disconnected"
        return f"<CopyAttachment session={self.id} {state} {self.mapping!r}>"

    @property
    def connected(self) -> bool:
        """Whether the daemon is there, as far as is known."""
        if self._connected and self._connection is not None:
            try:
                ended = not self._connection.recv(1, socket.MSG_PEEK | socket.MSG_DONTWAIT)
            except BlockingIOError:
                ended = False
            except OSError:
                ended = True
            if ended:
                self.hang_up()
        return self._connected

    def hint(self, entries: Sequence[int], needed: Sequence[int] = ()) -> None:
        """Nothing: the daemon's disk is not what readers of copies wait for."""

    def hang_up(self) -> None:
        """Ends the session and keeps the records; a second call does nothing."""
        self._connected = False
        if self._connection is not None:
            # A fork may have the connection too, and must not keep the session alive.
            with suppress(OSError):
                self._connection.shutdown(socket.SHUT_RDWR)
            self._connection.close()

    def leave(self) -> None:
        """Before attaching again: the records are good for the next daemon too."""
        self.hang_up()

    def close(self) -> None:
        """Ends the session and lets go of the records."""
        self.hang_up()
        self.mapping.close()

    def abandon_in_child(self) -> None:
        """After fork, in the child: the session is its parent's."""
        self._connected = False
        if self._connection is not None:
            self._connection.close()
        self.mapping.abandon_in_child()
