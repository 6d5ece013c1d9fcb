"""What the sync and the asyncio session share: everything but the RPCs."""

import warnings
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from expertd_client import calls
from expertd_client.annex import PackFiles, PackPlace, PackUnreadableError
from expertd_client.attachment import Attachment
from expertd_client.copy_attachment import CopyAttachment
from expertd_client.lease import Lease
from expertd_client.mapping import HoldState, Mapping
from expertd_client.model import ModelInfo
from expertd_client.record_cache import CacheFill, RecordCache
from expertstore.errors import (
    CapacityError,
    DeadlineError,
    ExpertdError,
    IncarnationError,
    NotFoundError,
    PreconditionError,
    SessionLostError,
    UnauthenticatedError,
    UnavailableError,
)
from expertstore.shared.directory import ABSENT
from expertstore.shared.unreachable import ForbiddenSocketError
from expertstore.v1 import expert_store_pb2 as pb

# A granted fetch is leased to the session, so the first attempt finds it; more than a
# few that do not mean that the daemon's directory and its answers contradict each other.
MAX_FETCHES = 4

# After these a reader of copies has to attach again.
SESSION_OVER = (UnavailableError, IncarnationError, UnauthenticatedError)

# The daemon is still starting: it has created the socket but perhaps not yet set its group.
NOT_YET = (UnavailableError, DeadlineError, ForbiddenSocketError)

_NOTHING: frozenset[int] = frozenset()


class PackWarning(UserWarning):
    """Records that have no slot in the arena cannot be read from the pack here."""


class BaseSession:
    """One attached worker: its model, its counters, and the way to resident records.

    A session is for one thread (or task) at a time, and for one lease at a time; attach
    once for each that works. It ends with :meth:`detach`, or when nobody refers to it.
    """

    host_hits: int
    """Experts acquired that were resident, over this object's life."""
    nvme_misses: int
    """Experts acquired that had to be fetched."""
    pack_reads: int
    """Of these, those that this process read from the pack, as the arena had no slot for them."""
    remote_misses: int
    """Experts acquired that had to be copied from the daemon, in a session that shares no memory;
    its host hits are those that it had copied before."""

    def __init__(self, attachment: Attachment | CopyAttachment, model: ModelInfo) -> None:
        self.host_hits = 0
        self.nvme_misses = self.pack_reads = 0
        self.remote_misses = 0
        self._detached = self._enters_pages = False
        self._pack_path: Path | None = None
        self.say: Callable[[str], None] | None = None
        """Told, in place of a :class:`PackWarning`, if the pack cannot be read."""
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
    def max_wave(self) -> int:
        """How many experts one lease can have, as was told when it attached."""
        return self._model.max_fetch_records

    @property
    def pack_path(self) -> Path:
        """Where this process finds the pack's files; the daemon's path, unless it is set.

        From there records are read for which the arena has no slot. If that fails, the session
        says so by a :class:`PackWarning`, and waits for slots from then on, until it attaches
        again or this is set.
        """
        return self._pack_path or self._model.pack_path

    @pack_path.setter
    def pack_path(self, path: Path) -> None:
        self._pack_path, self._reads_pack = path, True
        self._pack = PackFiles(path)

    @property
    def connected(self) -> bool:
        """Whether the daemon is there and keeps this session; False at once when not."""
        return self._attachment.connected

    @property
    def shares_memory(self) -> bool:
        """Whether records are read where the daemon has them; else this process has copies."""
        return self._attachment.shares_memory

    @property
    def arena_address(self) -> int:
        """Where this process has mapped the arena, read-only, or has its copies."""
        return self._mapping.arena_address

    @property
    def arena_bytes(self) -> int:
        """The size of that mapping."""
        return self._mapping.arena_bytes

    @property
    def mapped_bytes(self) -> int:
        """How much from :attr:`arena_address` on the offsets of leases may lead to.

        The arena, and behind it this process's copies of records that had no slot in it.
        """
        return self._mapping.mapped_bytes

    @property
    def arena_view(self) -> memoryview | None:
        """The arena, read-only; None in a session that has copies.

        Nothing in it is to be believed that :meth:`check_revoked` has not followed.
        """
        return self._mapping.arena if isinstance(self._mapping, Mapping) else None

    def check_revoked(self) -> None:
        """Raises as ``acquire`` does if bytes that were read of the arena may have been reused."""
        self._mapping.check_revoked()

    @property
    def directory_address(self) -> int:
        """Where this process has mapped the directory's first entry; 0 if it has copies.

        The entries are 64-bit words in the order of the model's layers and experts. Those read
        while a lease is held say where records are until its release; only the low half of a
        word that is not read as one is to be believed, and 0 there means absent.
        """
        return self._mapping.directory_address if isinstance(self._mapping, Mapping) else 0

    def absent(self, experts: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
        """Those (layer, expert) pairs that are not resident just now, in order.

        Costs no call; any thread may ask, also while a lease is held. For hints and counts: by
        the time that one looks again it may be otherwise. Raises NotFoundError.
        """
        self._mapping.check_attached()
        return [
            (layer, expert)
            for layer, expert in experts
            if self._mapping.absent(self._entries_of(layer, (expert,)))
        ]

    def anything_absent(self) -> bool:
        """Whether any expert of the model is not resident just now; as :meth:`absent`."""
        self._mapping.check_attached()
        return self._mapping.anything_absent()

    def hint(
        self, experts: Sequence[tuple[int, int]], needed: Sequence[tuple[int, int]] = ()
    ) -> None:
        """Says which (layer, expert) pairs are wanted next, likeliest first; waits for nothing.

        ``needed`` are those that the caller is about to acquire: the daemon begins to read them
        while the call is still on its way.

        What ``prefetch`` does without an answer, for who hints at every layer: it costs a system
        call. It supersedes what an older hint has not begun, also if it names no experts. May be
        called while a lease is held. Does nothing in a session that has copies or is over, which
        who acquires learns, too. Raises NotFoundError.
        """
        entries, at_once = (
            [self._entries_of(layer, (expert,))[0] for layer, expert in pairs]
            for pairs in (experts, needed)
        )
        self._attachment.hint(entries, at_once)

    def first_entry(self, layer: int) -> int:
        """The number of the directory's entry of a layer's expert 0; the others follow.

        Raises NotFoundError.
        """
        return self._entries_of(layer, (0,))[0]

    def hold(self) -> Lease:
        """A lease of nothing yet, to look resident experts up with :meth:`Lease.find`.

        For who reads experts of several layers and gives them all back at once. While it is
        held, nothing can be fetched. Raises as ``acquire`` does, but costs no call.
        """
        words = self._mapping.try_hold(())
        return Lease(self, self._mapping, None, (), words)

    def before_unmapping(self, call: Callable[[], None]) -> None:
        """Has ``call`` called once the memory at :attr:`arena_address` is about to be unmapped.

        For who has registered it somewhere. That moment comes when the session ends, or after
        it has attached to a daemon with another arena, or a few seconds after a daemon has gone;
        in the last case in another thread. ``call`` must neither use the session nor refer to it.
        Nothing calls it when the process exits.
        """
        self._mapping.before_unmapping(call)

    def enter_pages(self) -> None:
        """Begins to enter what is resident into this process's page table, in a thread.

        The first touch of each 4 KiB of a mapping costs a fault otherwise, which takes longer than
        computing with them. For who reads whatever is asked of it, as a worker on the CPU. Does
        nothing in a session that has copies.
        """
        if isinstance(self._mapping, Mapping):
            self._enters_pages = True
            self._mapping.enter_pages(
                [
                    layer.layout.record_bytes
                    for layer in self._model.layers.values()
                    for _ in range(layer.num_experts)
                ]
            )

    def _find(self, layer: int, experts: Sequence[int]) -> dict[int, int]:
        """The directory words of those that are resident, while a lease is held."""
        entries = self._entries_of(layer, experts)
        words = self._mapping.look_up(entries)
        if ABSENT in words:
            entries = [entry for entry, word in zip(entries, words, strict=True) if word]
        self._note(entries)
        return {expert: word for expert, word in zip(experts, words, strict=True) if word != ABSENT}

    def _note(self, entries: Sequence[int]) -> None:
        """Of experts that were resident, while a lease is held."""
        self._mapping.touch(entries, _NOTHING)
        self.host_hits += len(entries)

    def _take(self, attachment: Attachment | CopyAttachment, model: ModelInfo) -> None:
        """Lives in ``attachment`` from now on."""
        self._attachment = attachment
        self._mapping: Mapping | RecordCache = attachment.mapping
        self._model = model
        self._pack, self._reads_pack = PackFiles(self._pack_path or model.pack_path), True
        # One look-up that also refuses what is no expert.
        self._entries = {
            layer.layer: {expert: layer.first_entry + expert for expert in range(layer.num_experts)}
            for layer in model.layers.values()
        }
        # Not at exit: the system closes the connection then, and earlier than we would.
        self._finalizer = weakref.finalize(self, attachment.hang_up)
        self._finalizer.atexit = False
        if self._enters_pages:
            self.enter_pages()

    def _acquire_resident(self, layer: int, experts: Sequence[int]) -> Lease | set[int]:
        """The hit path: a lease if all experts are resident, else the entries that are not."""
        entries = self._entries_of(layer, experts)
        words = self._mapping.try_hold(entries)
        if ABSENT in words:
            return {entry for entry, word in zip(entries, words, strict=True) if word == ABSENT}
        self._mapping.touch(entries, _NOTHING)
        self.host_hits += len(entries)
        return Lease(self, self._mapping, layer, tuple(experts), words)

    def _acquire_fetched(
        self, layer: int, experts: Sequence[int], missed: set[int]
    ) -> Lease | None:
        """A lease after a fetch of these experts was granted."""
        entries = self._entries_of(layer, experts)
        words = self._mapping.try_hold(entries, HoldState.FETCHING)
        if ABSENT in words:
            return None
        if copies := self._mapping.copies:
            self.pack_reads += len(copies)
            missed = missed.union(copies)
        self._mapping.touch(entries, missed)
        num_missed = sum(entry in missed for entry in entries)
        if self.shares_memory:
            self.nvme_misses += num_missed
        else:
            self.remote_misses += num_missed
        self.host_hits += len(entries) - num_missed
        return Lease(self, self._mapping, layer, tuple(experts), words)

    def _fetch_call(
        self, layer: int, experts: Sequence[int], number: int, *, in_arena: bool, in_waves: bool
    ) -> calls.Call[list[PackPlace]]:
        most = 0
        if self._reads_pack and not in_arena and isinstance(self._mapping, Mapping):
            most = self._mapping.annex_bytes // self._model.layers[layer].layout.record_bytes
        return calls.fetch(layer, dict.fromkeys(experts), number, most, in_waves=in_waves)

    def _read_pack(self, layer: int, places: Sequence[PackPlace]) -> bool:
        """Copies those that are neither resident nor copied; whether there were any, and all are.

        Waits for the disk. While it does, nothing is held.
        """
        mapping = self._mapping
        assert isinstance(mapping, Mapping)
        entries = self._entries_of(layer, [place.expert for place in places])
        absent = mapping.absent(entries).difference(mapping.copies)
        num_bytes = self._model.layers[layer].layout.record_bytes
        try:
            return bool(absent) and all(
                mapping.copy(entry, num_bytes, partial(self._pack.read, place))
                for entry, place in zip(entries, places, strict=True)
                if entry in absent
            )
        except (PackUnreadableError, OSError) as error:
            self._reads_pack = False
            message = (
                f"The arena has no slot for some experts, and this process cannot read them from "
                f"the pack instead ({error}): it waits for slots, which is slower. Let it read "
                "the pack's files, or give the daemon more --ram."
            )
            if self.say is None:
                warnings.warn(message, PackWarning, stacklevel=2)
            else:
                self.say(message)
            return False

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

    def _begin_reattach(self) -> Mapping | None:
        """Ends the old connection, if it has not ended by itself. Raises PreconditionError.

        Returns what is mapped: if the next session's arena is the same, it stays so.
        """
        state = self._mapping.state
        if self._detached or state is HoldState.FORKED:
            self._mapping.check_attached()
        if state in (HoldState.HOLDING, HoldState.FETCHING):
            raise PreconditionError(
                "Release the lease that this session holds or waits for, then reattach."
            )
        self._attachment.leave()
        return self._mapping if isinstance(self._mapping, Mapping) else None

    def _finish_reattach(self, attachment: Attachment | CopyAttachment, model: ModelInfo) -> None:
        """Moves to another attachment. Raises PreconditionError if the model is another."""
        if model.fingerprint != self._model.fingerprint:
            attachment.close()
            raise PreconditionError(
                f"Model {model.name!r} is not what it was when this session attached (pack "
                f"fingerprint {model.fingerprint}, was {self._model.fingerprint}); load the "
                "worker's model anew."
            )
        self._finalizer.detach()
        if attachment.mapping is self._mapping:
            self._attachment.hang_up()
        else:
            self._attachment.close()
        self._take(attachment, model)

    @property
    def _cache(self) -> RecordCache | None:
        """The copies, in a session that shares no memory."""
        return self._mapping if isinstance(self._mapping, RecordCache) else None

    def _fill(self, cache: RecordCache, layer: int, experts: Sequence[int]) -> CacheFill:
        """What has to be read. Raises CapacityError if it does not fit."""
        entries = self._entries_of(layer, experts)
        return CacheFill(cache, self._model.layers[layer], experts, entries)

    def _read_call(self, fill: CacheFill) -> calls.Call[pb.ReadResponse]:
        return calls.read(self._model.name, fill.missing, self._model.fingerprint)

    def _over(self, error: ExpertdError) -> ExpertdError:
        """A read of copies failed because the daemon is not the one that we attached to."""
        self._attachment.hang_up()
        if isinstance(error, UnauthenticatedError):
            return SessionLostError("The daemon ended this session; reattach, and repeat.")
        return error

    def _check_pinnable(self) -> None:
        self._mapping.check_attached()
        if not self.shares_memory:
            raise PreconditionError(
                "Only a session that shares the daemon's memory can pin records there; this one "
                "has copies."
            )

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
