"""What the sync and the asyncio session share: everything but the RPCs."""

import weakref
from collections.abc import Sequence

from expertd.errors import (
    CapacityError,
    ExpertdError,
    NotFoundError,
    PreconditionError,
    UnavailableError,
)
from expertd_client.attachment import Attachment
from expertd_client.lease import Lease
from expertd_client.mapping import State
from expertd_client.model import ModelInfo

# A granted fetch is leased to the session, so the first attempt finds it; more than a
# few that do not mean that the daemon's directory and its answers contradict each other.
MAX_FETCHES = 4

_NOTHING: frozenset[int] = frozenset()


class BaseSession:
    """One attached worker: its model, its counters, and the way to resident records.

    A session is for one thread (or task) at a time, and for one lease at a time; attach
    once for each that works. It ends with :meth:`detach`, or when nobody refers to it.
    """

    host_hits: int
    """Experts acquired that were resident, over this object's life."""
    nvme_misses: int
    """Experts acquired that had to be fetched."""

    def __init__(self, attachment: Attachment, model: ModelInfo) -> None:
        self.host_hits = 0
        self.nvme_misses = 0
        self._detached = False
        self._take(attachment, model)

    def __repr__(self) -> str:
        return f"<{type(self).__name__} model={self.model.name!r} {self._attachment!r}>"

    @property
    def id(self) -> int:
        """The daemon's number for this session."""
        return self._attachment.id

    @property
    def incarnation(self) -> str:
        """Which daemon process attached it."""
        return self._attachment.incarnation

    @property
    def model(self) -> ModelInfo:
        """The model that it is attached to."""
        return self._model

    @property
    def connected(self) -> bool:
        """Whether the daemon is there and keeps this session; False at once when not."""
        return self._attachment.connected

    @property
    def arena_address(self) -> int:
        """Where this process has mapped the arena, read-only."""
        return self._mapping.arena_address

    @property
    def arena_bytes(self) -> int:
        """The size of that mapping."""
        return self._mapping.arena_bytes

    def _take(self, attachment: Attachment, model: ModelInfo) -> None:
        """Lives in ``attachment`` from now on."""
        self._attachment = attachment
        self._mapping = attachment.mapping
        self._model = model
        # One look-up that also refuses what is no expert.
        self._entries = {
            layer.layer: {expert: layer.first_entry + expert for expert in range(layer.num_experts)}
            for layer in model.layers.values()
        }
        # Not at exit: the system closes the connection then, and earlier than we would.
        self._finalizer = weakref.finalize(self, attachment.hang_up)
        self._finalizer.atexit = False

    def _acquire_resident(self, layer: int, experts: Sequence[int]) -> Lease | None:
        """The hit path: a lease if all experts are resident."""
        entries = self._entries_of(layer, experts)
        words = self._mapping.try_hold(entries)
        if words is None:
            return None
        self._mapping.touch(entries, _NOTHING)
        self.host_hits += len(entries)
        return Lease(self, self._mapping, layer, tuple(experts), words)

    def _acquire_fetched(
        self, layer: int, experts: Sequence[int], missed: set[int]
    ) -> Lease | None:
        """A lease after a fetch of these experts was granted."""
        entries = self._entries_of(layer, experts)
        words = self._mapping.try_hold(entries, State.FETCHING)
        if words is None:
            return None
        self._mapping.touch(entries, missed)
        num_missed = sum(entry in missed for entry in entries)
        self.nvme_misses += num_missed
        self.host_hits += len(entries) - num_missed
        return Lease(self, self._mapping, layer, tuple(experts), words)

    def _absent(self, layer: int, experts: Sequence[int]) -> set[int]:
        return self._mapping.absent(self._entries_of(layer, experts))

    def _absent_of(self, experts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those (layer, expert) pairs that are not resident just now, in order."""
        self._mapping.check_attached()
        return [
            (layer, expert)
            for layer, expert in experts
            if self._mapping.absent(self._entries_of(layer, (expert,)))
        ]

    def _entries_of(self, layer: int, experts: Sequence[int]) -> list[int]:
        try:
            table = self._entries[layer]
            return [table[expert] for expert in experts]
        except KeyError:
            raise self._no_such(layer, experts) from None

    def _no_such(self, layer: int, experts: Sequence[int]) -> NotFoundError:
        model = self._model
        if layer not in model.layers:
            return NotFoundError(
                f"Layer {layer} of model {model.name!r} has no experts; its MoE layers are "
                f"{_ranges(sorted(model.layers))}."
            )
        num_experts = model.layers[layer].num_experts
        wrong = next(expert for expert in experts if expert not in self._entries[layer])
        return NotFoundError(
            f"Layer {layer} of model {model.name!r} has no expert {wrong}; it has {num_experts}, "
            "numbered from 0."
        )

    def _not_granted(self, layer: int) -> ExpertdError:
        self._mapping.abandon_fetch()
        if not self.connected:
            return UnavailableError("The daemon has gone; reattach when one serves again.")
        return ExpertdError(
            f"The daemon granted experts of layer {layer} {MAX_FETCHES} times and withdrew them "
            "each time; this is a fault of the daemon."
        )

    def _begin_reattach(self) -> None:
        """Ends the old connection, if it has not ended by itself. Raises PreconditionError."""
        state = self._mapping.state
        if self._detached or state is State.FORKED:
            self._mapping.check_attached()
        if state in (State.HOLDING, State.FETCHING):
            raise PreconditionError(
                "Release the lease that this session holds or waits for, then reattach."
            )
        # That of a daemon that has gone is kept until there is another: what is resident
        # in it can still be read.
        if self._attachment.connected:
            self._attachment.close()

    def _finish_reattach(self, attachment: Attachment, model: ModelInfo) -> None:
        """Moves to another attachment. Raises PreconditionError if the model is another."""
        if model.fingerprint != self._model.fingerprint:
            attachment.close()
            raise PreconditionError(
                f"Model {model.name!r} is not what it was when this session attached (pack "
                f"fingerprint {model.fingerprint}, was {self._model.fingerprint}); load the "
                "worker's model anew."
            )
        self._end()
        self._take(attachment, model)

    def _end(self) -> None:
        self._finalizer.detach()
        self._attachment.close()


class WaveSize:
    """How many experts the next wave may have; shrinks when the daemon has less room."""

    def __init__(self, max_fetch_records: int) -> None:
        self.num_experts = max(1, max_fetch_records)

    def shrink(self, error: CapacityError) -> None:
        """After a refusal. Raises ``error`` again if waves are no way out."""
        if error.unit != "records" or not 0 < error.available < self.num_experts:
            raise error
        self.num_experts = error.available


def check_directory(attachment: Attachment, model: ModelInfo) -> None:
    """Raises PreconditionError if what was mapped is not the directory of ``model``."""
    num_entries = attachment.mapping.num_entries
    if num_entries != model.num_experts:
        raise PreconditionError(
            f"Model {model.name!r} has {model.num_experts} experts and the directory that was "
            f"mapped {num_entries} entries; was it replaced just now? Attach again."
        )


def _ranges(numbers: Sequence[int]) -> str:
    """Such as ``1-26, 30``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
