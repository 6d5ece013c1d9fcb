"""A worker of the campaign: does at random what workers do, and checks every byte it uses."""

import ctypes
import os
import random
import signal
import time
import traceback
from dataclasses import dataclass
from pathlib import Path

from expertd_client import (
    CapacityError,
    Client,
    IncarnationError,
    Lease,
    Session,
    SessionLostError,
    UnauthenticatedError,
    UnavailableError,
)
from tests.campaign.board import Board, Row
from tests.campaign.models import RECORDS, SPECS

CALL_SECONDS = 30.0
"""Nothing may take that long, on however busy a machine: a DeadlineError is a failure."""
ATTACH_SECONDS = 60.0

_PR_SET_PDEATHSIG = 1
# What the end of a session, or of the daemon, looks like to a worker.
_OVER = (UnavailableError, IncarnationError, SessionLostError, UnauthenticatedError)


@dataclass(frozen=True)
class Orders:
    """What a worker is told at its start; it works until it is killed or ``stop`` exists.

    One that is not killed takes a step at least.
    """

    directory: Path
    model: str
    seed: str
    board: Path
    num_rows: int
    row: int
    failures: Path
    """Directory for a report of what should not have happened."""
    stop: Path
    stall_seconds: float


def work(orders: Orders) -> None:
    """The process. Exit code 0: it was told to stop; 1: see its report."""
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    try:
        _Worker(orders).run()
    except BaseException:
        report = orders.failures / f"worker-{orders.row}.txt"
        report.write_text(f"{orders}\n{traceback.format_exc()}")
        os._exit(1)  # nothing of the interpreter's own end may hide or delay it
    os._exit(0)


class WrongBytesError(Exception):
    """A record that the worker was entitled to use was not the pack's."""


class _Worker:
    def __init__(self, orders: Orders) -> None:
        self._orders, self._spec = orders, SPECS[orders.model]
        self._chance = random.Random(orders.seed)
        self._board = Board(orders.board, orders.num_rows)
        self._row = Row()

    def run(self) -> None:
        with Client(self._orders.directory, timeout_seconds=CALL_SECONDS) as store:
            session = self._attach(store)
            while True:
                try:
                    self._step(store, session)
                except _OVER:
                    session.reattach(ATTACH_SECONDS)
                    self._attached()
                if self._orders.stop.exists():
                    return

    def _attach(self, store: Client) -> Session:
        deadline = time.monotonic() + ATTACH_SECONDS
        while True:
            try:
                session = store.attach(self._orders.model)
            except UnavailableError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                self._attached()
                return session

    def _attached(self) -> None:
        self._row.attaches += 1
        self._note()

    def _step(self, store: Client, session: Session) -> None:
        chance, spec = self._chance, self._spec
        layer = chance.randrange(spec.layers)
        if chance.random() < 0.25:
            session.prefetch([((layer + 1) % spec.layers, each) for each in self._some(4)])
        if chance.random() < 0.04:
            self._pin(session)
        if chance.random() < 0.03:
            self._read(store, layer)
        wanted = self._some(chance.choice((1, 2, 2, 2, 4, spec.experts)))
        before = session.host_hits, session.nvme_misses
        for lease in session.waves(layer, wanted):
            self._use(lease)
        self._row.hits += session.host_hits - before[0]
        self._row.misses += session.nvme_misses - before[1]
        self._note()

    def _some(self, count: int) -> list[int]:
        """Different experts; half of the time the first ones are likelier, so that some stay."""
        experts, chance = self._spec.experts, self._chance
        if count >= experts or chance.random() < 0.5:
            return chance.sample(range(experts), min(count, experts))
        found: dict[int, None] = {}
        while len(found) < count:
            found[int(experts * chance.random() ** 2)] = None
        return list(found)

    def _pin(self, session: Session) -> None:
        if self._chance.random() < 0.5:
            session.unpin()
            return
        layer = self._chance.randrange(self._spec.layers)
        try:
            session.pin([(layer, expert) for expert in self._some(2)])
        except CapacityError:
            session.unpin()  # the others' pins leave no room

    def _read(self, store: Client, layer: int) -> None:
        refs = [(layer, expert) for expert in self._some(2)]
        for record in store.read(self._orders.model, refs, timeout_seconds=CALL_SECONDS):
            self._judge(
                bytes(record.data) == RECORDS[self._orders.model, record.layer, record.expert],
                f"read ({record.layer}, {record.expert})",
            )
            self._row.reads += 1

    def _use(self, lease: Lease) -> None:
        try:
            differing = self._differing(lease)
            pause = self._pause()
            if pause:
                time.sleep(pause)
                differing |= self._differing(lease)
            lease.release()
        except SessionLostError:
            self._row.leases_lost += 1
            self._note()
            raise
        # Only now may it be used: the release did not say that the bytes may have changed.
        self._judge(not differing, f"layer {lease.layer}, experts {differing}, {lease.offsets}")
        self._row.records_used += len(lease.experts)
        self._row.bytes_used += len(lease.experts) * self._spec.record_bytes

    def _pause(self) -> float:
        """How long the layer takes; now and then longer than the daemon's patience."""
        kind = self._chance.random()
        if kind < 0.75:
            return 0.0
        if kind < 0.95:
            return self._chance.uniform(0.0, 0.004)
        if kind < 0.996:
            return self._chance.uniform(0.0, 0.05)
        return self._chance.uniform(1.0, 3.0) * self._orders.stall_seconds

    def _differing(self, lease: Lease) -> set[int]:
        model = self._orders.model
        return {
            expert
            for expert, view in zip(lease.experts, lease.views, strict=True)
            # bytes() first: comparing a memoryview goes item by item.
            if bytes(view) != RECORDS[model, lease.layer, expert]
        }

    def _judge(self, right: bool, what: str) -> None:
        if not right:
            self._row.records_wrong += 1
            self._note()
            raise WrongBytesError(f"{self._orders.model}: {what}")

    def _note(self) -> None:
        self._board.write(self._orders.row, self._row)
