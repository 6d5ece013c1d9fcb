"""What there is in the world of the epoch protocol: rules, workers' and daemon's own memory."""

from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple


class Violation(AssertionError):  # noqa: N818 - it is what the protocol forbids, not an error
    """The protocol broke a promise."""


class Publish(Enum):
    """When a worker loads the epoch that it publishes, and when it stores it."""

    QUIESCENT = auto()
    """As documented: both when it holds nothing."""
    EARLY_LOAD = auto()
    """Loads it before it looks up, stores it while it holds."""
    HOLDING = auto()
    """Wrong: loads and stores it while it holds."""


class Nudge(Enum):
    """How the worker's small thread publishes."""

    LOCKED = auto()
    """As documented: checks the flag and publishes under the mutex."""
    LOADS_FIRST = auto()
    """No mutex; loads the epoch, then checks the flag, then stores."""
    CHECKS_FIRST = auto()
    """Wrong: no mutex; checks the flag, then loads, then stores."""


@dataclass(frozen=True)
class Rules:
    """The protocol, and ways to break it."""

    publish: Publish = Publish.QUIESCENT
    nudge: Nudge = Nudge.LOCKED
    check_epochs: bool = True
    withdraw_first: bool = True
    respect_leases: bool = True
    revoke_first: bool = True
    release_first: bool = True
    """Workers stop holding before they wait for a fetch."""
    copy_first: bool = True
    """A record that moves is copied before its new word is stored."""
    show_first: bool = True
    """Its new word is stored before the epoch is advanced."""
    retire_moved: bool = True
    """Its old bytes wait for the epoch like an evicted record's."""
    announce_first: bool = True
    """A daemon that took over stores its number before it reuses a byte."""
    check_number: bool = True
    """Workers look at that number before they use what they have read."""
    count_all: bool = True
    """Every adoption has a number of its own, also one that reused nothing."""


class At(Enum):
    """What a worker does next."""

    HOLD = auto()
    EARLY = auto()
    LOOK = auto()
    LOAD_HELD = auto()
    PUBLISH_HELD = auto()
    STOP = auto()
    RELEASE = auto()
    LOAD_EPOCH = auto()
    STORE_EPOCH = auto()
    CHECK = auto()
    FETCH = auto()
    WAIT = auto()
    DONE = auto()
    LOST = auto()


class Nudged(Enum):
    """What a worker's small thread does next."""

    SLEEP = auto()
    LOAD = auto()
    CHECK = auto()
    STORE = auto()


class Ref(NamedTuple):
    """A record that a worker believes to read."""

    entry: int
    offset: int


@dataclass
class Worker:
    """One worker's own memory."""

    steps: tuple[tuple[int, ...], ...]
    at: At = At.HOLD
    step: int = 0
    holding: bool = False
    looked: int = 0
    """So many of the step's entries have been looked up since it holds."""
    absent: tuple[int, ...] = ()
    """What it has looked up in vain since it holds."""
    left: tuple[int, ...] = ()
    """What it is yet to read of its step, if not all of it; the first of them is fetched."""
    refs: tuple[Ref, ...] = ()
    missed: bool = False
    granted: bool = False
    tainted: bool = False
    epoch: int = 0
    fetches: int = 0
    nudged: Nudged = Nudged.SLEEP
    nudge_epoch: int = 0
    number: int = 0
    """Which daemon it is attached to."""

    def state(self) -> tuple[Any, ...]:
        return (
            self.at, self.step, self.holding, self.looked, self.absent, self.left, self.refs,
            self.missed, self.granted, self.tainted, self.epoch, self.fetches, self.nudged,
            self.nudge_epoch, self.number,
        )  # fmt: skip

    @property
    def wanted(self) -> tuple[int, ...]:
        """What it looks up while it holds, in this order."""
        return self.left or self.steps[self.step]

    @property
    def fetched(self) -> tuple[int, ...]:
        """What it fetches of that."""
        return self.left[:1] or self.steps[self.step]

    def restore(self, state: tuple[Any, ...]) -> None:
        (
            self.at, self.step, self.holding, self.looked, self.absent, self.left, self.refs,
            self.missed, self.granted, self.tainted, self.epoch, self.fetches, self.nudged,
            self.nudge_epoch, self.number,
        ) = state  # fmt: skip


class Request(NamedTuple):
    """A fetch that waits."""

    worker: int
    number: int
    entries: tuple[int, ...]


@dataclass
class Desk:
    """The daemon's own memory, besides the extents and the reclaimer."""

    live: frozenset[int]
    queue: tuple[Request, ...] = ()
    leases: frozenset[Request] = frozenset()
    resident: tuple[int | None, ...] = ()
    """Per entry, the offset of its record."""
    loading: tuple[int, int] | None = None
    """Entry and offset of the record that is read."""
    evicting: tuple[int, int] | None = None
    """Entry and epoch between withdrawing and retiring; 0: the epoch is yet to be advanced."""
    seen: tuple[tuple[int, int], ...] = ()
    """Worker and epoch of the pages read in this round."""
    moving: tuple[int, int, int] | None = None
    """Entry, new offset, and the epoch after which the old one is free; 0: not yet advanced."""
    num_moves: int = 0
    cutting: int | None = None
    num_cuts: int = 0
    num_deaths: int = 0
    number: int = 0
    """Of this daemon."""
    has_loaded: bool = False
    announced: bool = True
    """Whether all sessions of earlier daemons, if there were any, are told of reuse."""

    def state(self) -> tuple[Any, ...]:
        return (
            self.live, self.queue, self.leases, self.resident, self.loading, self.evicting,
            self.seen, self.moving, self.num_moves, self.cutting, self.num_cuts,
            self.num_deaths, self.number, self.has_loaded, self.announced,
        )  # fmt: skip
