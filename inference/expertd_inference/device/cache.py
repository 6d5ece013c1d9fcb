"""Which expert lies in which slot of a device: pure policy, over plain values.

A :class:`SlotCache` decides, its caller copies. Slots are of two kinds, and change it without a
copy: *cached* ones hold experts that were used, *staged* ones (few: the paper's b = 4 buffers)
those that were only guessed. A guess takes the place of an older guess and evicts nothing. When
it is used, its slot joins the cache, and the slot of the expert evicted for it becomes a staging
slot in its stead (Eliseev & Mazur, arXiv 2312.17238, section 3.2).

:meth:`SlotCache.assign` leases what it assigns until :meth:`SlotCache.release`: an expert that
the running layer uses is not evicted for another of the same layer, be it found or yet to be
copied (the fault of vllm #37190).
"""

from collections import OrderedDict, deque
from collections.abc import Iterable, Mapping, Sequence
from enum import Enum, auto
from typing import NamedTuple

from expertd_inference.device.heat import Heat
from expertd_inference.settings import CachePolicy

Key = tuple[int, int]
"""Layer and expert."""


class Found(Enum):
    """How an expert that is used came to its slot."""

    CACHED = auto()
    """It was there."""
    STAGED = auto()
    """It was guessed; its copy may still be on the way."""
    MISSED = auto()
    """It has to be copied to the slot that it was given."""


class Placed(NamedTuple):
    """Where an expert is, or is to be copied."""

    expert: int
    slot: int
    found: Found


class SlotCache:
    """``num_slots`` slots for the experts of ``layers`` (layer to how many it has).

    Slots from ``num_slots`` on, ``num_staging`` of them, are for guesses at first.
    """

    def __init__(
        self,
        num_slots: int,
        num_staging: int,
        layers: Mapping[int, int],
        policy: CachePolicy = CachePolicy.LRU,
    ) -> None:
        self.num_slots = num_slots
        self.num_staging = num_staging
        self.num_wasted = 0
        """Guesses that gave way to others before they were used."""
        self._policy = policy
        self._layers = sorted(layers)
        # Per layer, the slot of each cached expert, the least recently used first.
        self._cached: dict[int, OrderedDict[int, int]] = {
            layer: OrderedDict() for layer in self._layers
        }
        self._staged: OrderedDict[Key, int] = OrderedDict()
        self._free = deque(range(num_slots))
        self._free_staging = deque(range(num_slots, num_slots + num_staging))
        self._leased: set[Key] = set()
        self._heat = Heat()
        self._running = self._layers[0]

    def __repr__(self) -> str:
        num_cached = sum(map(len, self._cached.values()))
        return (
            f"<SlotCache {num_cached}/{self.num_slots} cached, {len(self._staged)} staged, "
            f"{len(self._leased)} leased>"
        )

    @property
    def room(self) -> int:
        """A layer's fair share of the slots: what it may take without harm to the others."""
        return max(1, self.num_slots // len(self._layers))

    @property
    def num_free(self) -> int:
        """Slots that hold nothing yet."""
        return len(self._free)

    def slots_of(self, layer: int) -> Mapping[int, int]:
        """The slots of the layer's cached experts."""
        return self._cached[layer]

    def has(self, layer: int, expert: int) -> bool:
        """Whether it is cached or staged."""
        return expert in self._cached[layer] or (layer, expert) in self._staged

    def split(self, layer: int, experts: Iterable[int]) -> tuple[list[int], list[int]]:
        """Those that are cached or staged, and the others."""
        present: list[int] = []
        missing: list[int] = []
        for expert in experts:
            (present if self.has(layer, expert) else missing).append(expert)
        return present, missing

    def begin_layer(self, layer: int) -> None:
        """Before a layer's first :meth:`assign`: time passes once per round of the layers."""
        if layer <= self._running:
            self._heat.pass_step()
        self._running = layer

    def assign(self, layer: int, experts: Sequence[int]) -> list[Placed]:
        """Slots for ``experts``, which are in use from now on and leased.

        Raises ValueError if more would be leased than there are slots for.
        """
        # All that is there is leased before anything is evicted for what is not.
        needed = [(layer, expert) for expert in experts]
        if len(self._leased.union(needed)) > self.num_slots:
            raise ValueError(f"{len(experts)} experts at once, and {self.num_slots} slots")
        self._leased.update(needed)
        return [self._place(layer, expert) for expert in experts]

    def release(self) -> None:
        """Ends all leases: what was assigned has been given to the device to compute."""
        self._leased.clear()

    def renew(self, layer: int, expert: int) -> bool:
        """Whether it is there when it is guessed; an older guess then counts as a new one."""
        if (layer, expert) in self._staged:
            self._staged.move_to_end((layer, expert))
        return self.has(layer, expert)

    def stage(self, layer: int, expert: int) -> int | None:
        """The slot to copy a guessed expert to; None if it is there, or there is no such slot."""
        if self.has(layer, expert):
            return None
        if self._free_staging:
            slot = self._free_staging.popleft()
        elif self._staged:
            _, slot = self._staged.popitem(last=False)
            self.num_wasted += 1
        else:
            return None
        self._staged[layer, expert] = slot
        return slot

    def forget(self, layer: int, expert: int) -> None:
        """Its slot does not hold what it should."""
        self._leased.discard((layer, expert))
        slot = self._cached[layer].pop(expert, None)
        if slot is not None:
            self._free.append(slot)
        slot = self._staged.pop((layer, expert), None)
        if slot is not None:
            self._free_staging.append(slot)

    def clear(self) -> None:
        """Forgets everything: others are going to write to the slots."""
        for layer, cached in self._cached.items():
            for expert in list(cached):
                self.forget(layer, expert)
        for layer, expert in list(self._staged):
            self.forget(layer, expert)

    @property
    def is_empty(self) -> bool:
        """Whether no slot holds anything that counts."""
        return not self._staged and not any(self._cached.values())

    def _place(self, layer: int, expert: int) -> Placed:
        placed = self._find_or_make_room(layer, expert)
        # Now that it is cached: the heat of what is absent is not looked at.
        self._heat.use((layer, expert))
        return placed

    def _find_or_make_room(self, layer: int, expert: int) -> Placed:
        cached, key = self._cached[layer], (layer, expert)
        if expert in cached:
            cached.move_to_end(expert)
            return Placed(expert, cached[expert], Found.CACHED)
        made_free = self._free.popleft() if self._free else self._evict(layer)
        slot = self._staged.pop(key, None)
        if slot is None:
            cached[expert] = made_free
            return Placed(expert, made_free, Found.MISSED)
        self._free_staging.append(made_free)
        cached[expert] = slot
        return Placed(expert, slot, Found.STAGED)

    def _evict(self, layer: int) -> int:
        """The slot of the expert that is worth least."""
        victim = (
            self._heat.coldest(self._is_cached, self._leased)
            if self._policy is CachePolicy.AGED
            else self._least_recently_used(layer)
        )
        return self._cached[victim[0]].pop(victim[1])

    def _is_cached(self, key: Key) -> bool:
        return key[1] in self._cached[key[0]]

    def _least_recently_used(self, layer: int) -> Key:
        """From the layer that has most, so that each comes to have its share, as in the paper.

        Of layers that have equally many, the running one; then that whose turn comes last.
        """
        turns = len(self._layers)
        index = self._layers.index(layer)

        def wealth(position: int) -> tuple[int, int]:
            # The running layer's own turn is a whole round away.
            return len(self._cached[self._layers[position]]), (position - index - 1) % turns

        for position in sorted(range(turns), key=wealth, reverse=True):
            owner = self._layers[position]
            for expert in self._cached[owner]:
                if (owner, expert) not in self._leased:
                    return owner, expert
        raise AssertionError("more is leased than there are slots")
