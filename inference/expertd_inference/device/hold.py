"""What a step's copies read of the arena, held until they have arrived.

The rule is the client's (``docs/protocol.md``, "Holding across a step"): look-ups cost no call
and go on as long as the hold does; before anything is fetched, and at the step's end, all is
released, which has to wait for the copies, since until then the device reads.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import NamedTuple

from expertd_inference.device.device import Event
from expertd_inference.experts.source import HeldLease, HeldSource
from expertstore.errors import DeviceError, ExpertdError


class HeldCopy(NamedTuple):
    """A copy whose source may not have been verified to be what it was."""

    event: Event
    forget: Callable[[], None]
    """Undoes it: nobody may take the slot for the record."""


class StepHold:
    """The hold of one session, for all devices that copy from it."""

    def __init__(self, source: HeldSource) -> None:
        self._source = source
        self._lease: HeldLease | None = None
        self._copies: list[HeldCopy] = []

    def __repr__(self) -> str:
        state = "idle" if self._lease is None else f"held for {len(self._copies)} copies"
        return f"<StepHold {state}>"

    def find(self, layer: int, experts: Sequence[int]) -> dict[int, int]:
        """Offsets in the arena of those that are resident; they stay so until the release."""
        if self._lease is None:
            self._lease = self._source.hold()
        return self._lease.find(layer, experts)

    def fetch(
        self, layer: int, experts: Sequence[int], *, in_arena: bool = False
    ) -> Iterator[dict[int, int]]:
        """Releases, and has the daemon bring ``experts``: the offsets of as many as fit at once.

        Each lot is released before the next, so its copies are to be queued before that.
        ``in_arena``: for who looks them up in the directory after that.
        """
        self.release()
        num_left = len(experts)
        for lease in self._source.waves(layer, experts, in_arena=in_arena):
            self._lease = lease
            yield dict(zip(lease.experts, lease.offsets, strict=True))
            num_left -= len(lease.experts)
            if num_left:
                self.release()

    def reads(self, event: Event, forget: Callable[[], None]) -> None:
        """A copy was queued that reads what is held."""
        self._copies.append(HeldCopy(event, forget))

    def check(self) -> bool:
        """Whether there are copies that have arrived, which are good: else SessionLostError.

        To be called where the host knows that copies have arrived, and before it passes on
        what was computed from them.
        """
        if self._lease is None:
            return False
        # Asked before the check: what arrives after it may be bad all the same.
        open_copies = [copy for copy in self._copies if not copy.event.done]
        self._lease.check()
        num_verified = len(self._copies) - len(open_copies)
        self._copies = open_copies
        return num_verified > 0

    def release(self) -> None:
        """Waits for the copies, and gives everything back. Raises SessionLostError.

        After that error the copies are still known, to be forgotten by :meth:`undo`.
        """
        if self._lease is None:
            return
        for copy in self._copies:
            copy.event.wait()
        lease, self._lease = self._lease, None
        lease.release()
        self._copies.clear()

    def undo(self) -> bool:
        """Releases, and forgets the copies that were not verified; whether there were any."""
        try:
            self.release()
        except DeviceError:
            # Nobody reads any more.
            lease, self._lease = self._lease, None
            if lease is not None:
                with suppress(ExpertdError):
                    lease.release()
        except ExpertdError:
            pass  # The session is lost, which is why the copies are undone.
        copies, self._copies = self._copies, []
        for copy in copies:
            copy.forget()
        return bool(copies)
