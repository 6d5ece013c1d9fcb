"""One life of a session: from one handshake to the end of that connection."""

import os
import socket
import threading
import weakref
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Protocol

from expertd_client.mapping import Mapping
from expertstore.errors import PreconditionError
from expertstore.shared.greeting import Greeting
from expertstore.shared.handshake import MAX_PACKET_BYTES, NUDGE, encode_hint

KEEP_SECONDS = 5.0
"""How long the arena of a daemon that has gone stays mapped.

A warm restart is over by then as a rule, and the mapping is still good after it. After a cold
one the next daemon may need the RAM, and waits for it for longer than this.
"""


class Attachment:
    """What a worker has of the daemon: the mappings, and the connection that is its lease.

    A thread waits on the connection: for nudges, which it answers while the worker holds
    nothing, and for its end, after which it keeps the arena for ``KEEP_SECONDS``.
    """

    shares_memory = True

    def __init__(self, greeting: Greeting, previous: Mapping | None = None) -> None:
        """Takes over the greeting's connection. Raises PreconditionError, OSError.

        ``previous`` is what the session had mapped before.
        """
        welcome = greeting.welcome
        self.id = welcome.session
        self.incarnation = welcome.incarnation
        self.credentials = greeting.credentials
        try:
            self.mapping = Mapping.map(
                greeting.descriptors,
                arena_bytes=welcome.arena_bytes,
                directory_bytes=welcome.directory_bytes,
                page_bytes=welcome.page_bytes,
                adoption=welcome.adoption,
                annex_bytes=welcome.annex_bytes,
                previous=previous,
            )
        except ValueError as error:
            raise PreconditionError(
                f"The shared memory of the daemon is not what this client knows ({error}); run "
                "the same version on both sides."
            ) from error
        self._connected = True
        self._over = threading.Event()
        # Two descriptors of one connection: the thread closes its own when it ends, so
        # that no other thread can close it beneath a recv; shutdown on the other ends both.
        with ExitStack() as on_failure:
            self._heard = on_failure.enter_context(greeting.take_connection())
            self._control = on_failure.enter_context(self._heard.dup())
            self._thread = threading.Thread(
                target=self._listen, name="expertd-listener", daemon=True
            )
            self._thread.start()
            on_failure.pop_all()
        abandon_in_child(self)

    def __repr__(self) -> str:
        state = "connected" if self._connected else "disconnected"
        return f"<Attachment session={self.id} {state} {self.mapping!r}>"

    @property
    def connected(self) -> bool:
        """Whether the daemon that attached this session is there and keeps it."""
        return self._connected

    def hint(self, entries: Sequence[int], needed: Sequence[int] = ()) -> None:
        """Says which directory entries are wanted next, in place of the last hint.

        And which are ``needed`` now, for a fetch that follows.

        Waits for nothing: where the daemon has not taken in many earlier ones, or is gone, this
        one is not sent.
        """
        with suppress(OSError):
            packet = encode_hint(entries, needed)
            self._control.send(packet, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)

    def close(self) -> None:
        """Ends the session; a second call does nothing."""
        self.mapping.close()
        self.hang_up()
        if threading.current_thread() is not self._thread:
            self._thread.join()

    def leave(self) -> None:
        """Ends the connection before attaching again; the thread then lets go of the arena."""
        self._disconnect()

    def hang_up(self) -> None:
        """Ends connection and thread, without waiting for it; safe in a finalizer."""
        self._over.set()
        self._disconnect()

    def _disconnect(self) -> None:
        self._connected = False
        # Not connected any more, or closed before.
        with suppress(OSError):
            self._control.shutdown(socket.SHUT_RDWR)
        self._control.close()

    def _listen(self) -> None:
        with self._heard:
            while True:
                try:
                    packet = self._heard.recv(MAX_PACKET_BYTES)
                except OSError:
                    break
                if not packet:
                    break
                if packet == NUDGE:
                    self.mapping.publish()
        self._connected = False
        self.mapping.disconnect()
        while not self._over.wait(KEEP_SECONDS):
            if self.mapping.leave():
                break

    def abandon_in_child(self) -> None:
        """After fork, in the child: the session is its parent's."""
        # Closed, not shut down: the connection is the parent's. Left open, it would keep
        # the parent's session alive after the parent.
        self._connected = False
        self._over = threading.Event()  # its lock may have been held by the thread
        self._heard.close()
        self._control.close()
        self.mapping.abandon_in_child()


class _Forkable(Protocol):
    def abandon_in_child(self) -> None: ...


_live: "weakref.WeakSet[_Forkable]" = weakref.WeakSet()


def abandon_in_child(attachment: _Forkable) -> None:
    """From now on a fork of this process has ``attachment.abandon_in_child`` called."""
    _live.add(attachment)


def _abandon_all_in_child() -> None:
    for attachment in list(_live):
        attachment.abandon_in_child()


os.register_at_fork(after_in_child=_abandon_all_in_child)
