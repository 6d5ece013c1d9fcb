"""The kill campaign: workers and the daemon die at random under load, and nothing may show.

First only workers die, in rounds; after each, with all of them gone, what the daemon holds is
compared with what it held after the first. Then the daemon dies too.
"""

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

from expertd_client import Client, ExpertdError
from tests.campaign.board import Board, Row
from tests.campaign.models import BUDGET_BYTES, RECORDS, SPECS, make_packs
from tests.campaign.process import Holdings, exists, holdings
from tests.campaign.supervisor import Supervisor
from tests.campaign.worker import Orders, work

NUM_WORKERS = 8
STALL_SECONDS = 0.5
SETTINGS = f"stall_seconds = {STALL_SECONDS}\ndrain_seconds = 0.5\nmax_sessions = 64\n"
ROUNDS = 5
"""Of worker kills alone; the first warms up."""
KILLS_PER_STOP = 30
"""Then a worker is stopped for longer than the daemon waits, and goes on."""
MAX_THREAD_GROWTH = 40
"""The pool for blocking calls and gRPC's own grow once; a leak would be one a kill."""
MAX_HEAP_GROWTH_BYTES = 8 << 20
"""Over all rounds. A leak of a session object and its page's view would be 10 KiB a kill."""
SETTLE_SECONDS = 30.0
SAY_SECONDS = 5.0


@dataclass(frozen=True)
class Plan:
    """What is to happen at least."""

    worker_kills: int
    daemon_kills: int
    seconds: float
    """The campaign goes on at the same rates until these have passed."""
    seed: int


@dataclass
class Report:
    """What did happen, and what should not have."""

    plan: Plan
    worker_kills: int = 0
    worker_stops: int = 0
    daemon_kills: int = 0
    seconds: float = 0.0
    work: Row = field(default_factory=Row)
    rounds: list[Holdings] = field(default_factory=list)
    restart_seconds: list[float] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}


class Campaign:
    """One run. ``directory`` is for packs and reports, ``say`` gets a line now and then."""

    def __init__(
        self, plan: Plan, directory: Path, supervisor: Supervisor, say: Callable[[str], None]
    ) -> None:
        self.report = Report(plan)
        self._plan, self._directory, self._supervisor = plan, directory, supervisor
        self._say, self._said = say, 0.0
        self._chance = random.Random(plan.seed)
        self._began = time.monotonic()
        self._workers: list[tuple[int, ForkServerProcess]] = []
        self._started = 0
        self._pids: list[int] = []
        # Room for as many as could ever be started: sparse, so it costs nothing.
        self._num_rows = 1 << 20
        self._board = Board(directory / "board", self._num_rows)
        self._failures = directory / "failures"
        self._failures.mkdir()
        # Workers are forked from a process that has all they need, and nothing attached.
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload([work.__module__])

    def run(self) -> Report:
        """The whole campaign."""
        report, plan = self.report, self._plan
        alone = plan.worker_kills // 2 if plan.daemon_kills else plan.worker_kills
        try:
            for index in range(ROUNDS):
                self._kill_workers(alone * (index + 1) // ROUNDS, plan.seconds / 2 / ROUNDS)
                if report.problems:
                    return report
            self._compare_rounds()
            if plan.daemon_kills:
                self._kill_both()
        except ExpertdError as error:  # of this process's own look at the daemon
            self._problem(f"{type(error).__name__}: {error}")
        finally:
            self._end()
        return report

    # The two parts

    def _kill_workers(self, until: int, seconds: float) -> None:
        """One round."""
        with self._load():
            end = time.monotonic() + seconds
            while self.report.worker_kills < until or time.monotonic() < end:
                self._kill_one_worker()
                if not self._watch("workers die"):
                    return
            self._check_sessions()
        self._check_all_free()
        self._take_stock()

    def _kill_both(self) -> None:
        report, plan = self.report, self._plan
        with self._load():
            end = time.monotonic() + plan.seconds / 2
            while report.daemon_kills < plan.daemon_kills or time.monotonic() < end:
                left = max(0, plan.worker_kills - report.worker_kills)
                for _ in range(max(2, left // max(1, plan.daemon_kills - report.daemon_kills))):
                    self._kill_one_worker()
                self._check_progress()
                report.restart_seconds.append(self._supervisor.restart(self._chance))
                report.daemon_kills += 1
                if not self._watch("workers and the daemon die"):
                    return
            while report.worker_kills < plan.worker_kills and self._watch("workers die"):
                self._kill_one_worker()
            self._check_progress()
            self._check_sessions()
        self._check_all_free()

    # Workers

    @contextmanager
    def _load(self) -> Iterator[None]:
        """Workers at work; at the end all are gone, half by kill -9, half by themselves."""
        stop = self._directory / "stop"
        stop.unlink(missing_ok=True)
        for _ in range(NUM_WORKERS):
            self._start_worker()
        try:
            yield
        finally:
            for row, process in self._workers[::2]:
                self._kill(row, process)
            stop.touch()
            deadline = time.monotonic() + SETTLE_SECONDS
            for row, process in self._workers[1::2]:
                process.join(max(0.1, deadline - time.monotonic()))
                if process.exitcode is None:
                    self._problem(f"worker {row} did not stop within {SETTLE_SECONDS:g} s.")
                    process.kill()
                    process.join()
                self._look_at(row, process)
            self._workers.clear()

    def _start_worker(self) -> None:
        row, self._started = self._started, self._started + 1
        orders = Orders(
            directory=self._supervisor.directory,
            model=self._chance.choice(list(SPECS)),
            seed=f"{self._plan.seed}/{row}",
            board=self._directory / "board",
            num_rows=self._num_rows,
            row=row,
            failures=self._failures,
            stop=self._directory / "stop",
            stall_seconds=STALL_SECONDS,
        )
        process = self._context.Process(target=work, args=(orders,))
        process.start()
        assert process.pid is not None
        self._pids.append(process.pid)
        self._workers.append((row, process))

    def _kill_one_worker(self) -> None:
        """A random one, after a random time; another takes its place."""
        # A quarter of them follow at once, so that some die before they have attached.
        if self._chance.random() < 0.75:
            time.sleep(self._chance.expovariate(25))
        if self.report.worker_kills % KILLS_PER_STOP == KILLS_PER_STOP - 1:
            self._stop_one_worker()
        row, process = self._workers.pop(self._chance.randrange(len(self._workers)))
        self._kill(row, process)
        self.report.worker_kills += 1
        self._start_worker()

    def _stop_one_worker(self) -> None:
        """It wakes up to find that what it was reading has changed."""
        _, process = self._chance.choice(self._workers)
        assert process.pid is not None
        with suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGSTOP)
            time.sleep(self._chance.uniform(0.5, 3) * STALL_SECONDS)
            os.kill(process.pid, signal.SIGCONT)
            self.report.worker_stops += 1

    def _kill(self, row: int, process: ForkServerProcess) -> None:
        process.kill()
        process.join()
        self._look_at(row, process)

    def _look_at(self, row: int, process: ForkServerProcess) -> None:
        """After its end: did it end by itself, and why?"""
        if process.exitcode not in (0, -signal.SIGKILL):
            report = self._failures / f"worker-{row}.txt"
            text = report.read_text() if report.exists() else "no report"
            self._problem(f"worker {row} ended with {process.exitcode}:\n{text}")
        process.close()

    # Checks

    def _look_at_ended(self) -> None:
        """None ends by itself before it is told to."""
        for row, process in [*self._workers]:
            if process.exitcode is not None:
                self._workers.remove((row, process))
                self._look_at(row, process)

    def _watch(self, doing: str) -> bool:
        """Progress, and whether to go on."""
        self._look_at_ended()
        for problem in self._supervisor.problems():
            self._problem(problem)
        now = time.monotonic()
        if now > self._said + SAY_SECONDS:
            self._said, report = now, self.report
            self._say(
                f"{now - self._began:4.0f} s  {doing}: {report.worker_kills} workers and "
                f"{report.daemon_kills} daemons killed, "
                f"{self._board.total(self._started).records_used} records used"
            )
        return not self.report.problems

    def _check_sessions(self) -> None:
        """The daemon's sessions are those of the workers that live."""

        def settled() -> bool:
            self._look_at_ended()
            alive = {process.pid for _, process in self._workers}
            attached = {each["pid"] for each in self._stats()["sessions"] if each["model"]}
            return attached == alive

        self._eventually(settled, "the sessions are not those of the workers")

    def _check_progress(self) -> None:
        """Workers find the daemon again, by themselves."""
        before = self._board.total(self._started).records_used
        self._eventually(
            lambda: self._board.total(self._started).records_used > before, "no worker gets on"
        )

    def _check_all_free(self) -> None:
        """With every worker gone, no session is left, and one can have all of the arena."""
        self._eventually(lambda: not self._stats()["sessions"], "sessions are left")
        with Client(self._supervisor.directory, timeout_seconds=SETTLE_SECONDS) as store:
            for name, spec in SPECS.items():
                with store.attach(name) as session:
                    experts = list(range(spec.experts))
                    num_left = min(session.model.max_fetch_records, spec.layers * spec.experts)
                    session.pin([(0, expert) for expert in experts[: spec.experts_per_token]])
                    session.unpin()
                    for layer in range(spec.layers):
                        for lease in session.waves(layer, experts):
                            with lease:
                                for expert, view in zip(lease.experts, lease.views, strict=True):
                                    if bytes(view) != RECORDS[name, layer, expert]:
                                        self._problem(f"{name} {layer} {expert} is wrong")
                    if num_left < BUDGET_BYTES // spec.record_bytes:
                        self._problem(f"only {num_left} records of {name} fit at once")
        self._eventually(lambda: not self._stats()["sessions"], "sessions are left")
        stats = self._stats()
        if stats["arena"]["bytes_used"] > stats["arena"]["bytes_total"]:
            self._problem(f"more than there is: {stats['arena']}")
        lost = [model["name"] for model in stats["models"] if model["records_lost"]]
        if lost:
            self._problem(f"records were lost: {lost}")

    def _take_stock(self) -> None:
        """What the daemon holds, once gRPC has closed the last connection."""
        rounds, pid = self.report.rounds, self._supervisor.pid
        time.sleep(0.2)
        if rounds:
            with suppress(TimeoutError):
                self._wait(lambda: holdings(pid).num_files <= rounds[0].num_files, 5.0)
        rounds.append(holdings(pid))

    def _compare_rounds(self) -> None:
        first, last = self.report.rounds[0], self.report.rounds[-1]
        if last.num_threads > first.num_threads + MAX_THREAD_GROWTH:
            self._problem(f"threads were {first.num_threads}, are {last.num_threads}")
        for name in ("num_files", "num_mappings"):
            if getattr(last, name) != getattr(first, name):
                self._problem(f"{name} was {getattr(first, name)}, is {getattr(last, name)}")
        # Of shared memory every page counts; the heap breathes.
        if last.shared_bytes > first.shared_bytes:
            self._problem(f"shared memory grew from {first.shared_bytes} to {last.shared_bytes}")
        if last.anonymous_bytes > first.anonymous_bytes + MAX_HEAP_GROWTH_BYTES:
            self._problem(f"the heap grew from {first.anonymous_bytes} to {last.anonymous_bytes}")

    def _end(self) -> None:
        report = self.report
        report.work = self._board.total(self._started)
        report.seconds = time.monotonic() - self._began
        if report.work.records_wrong:
            self._problem(f"{report.work.records_wrong} records were wrong")
        left = [pid for pid in self._pids if exists(pid)]
        if left:
            self._problem(f"processes are left: {left}")

    def _stats(self) -> dict[str, Any]:
        with Client(self._supervisor.directory, timeout_seconds=10) as store:
            return store.stats()

    def _eventually(self, condition: Callable[[], bool], otherwise: str) -> None:
        try:
            self._wait(condition, SETTLE_SECONDS)
        except TimeoutError:
            self._problem(f"after {SETTLE_SECONDS:g} s, {otherwise}")

    def _wait(self, condition: Callable[[], bool], seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while True:
            with suppress(ExpertdError):  # a daemon that is just starting
                if condition():
                    return
            if time.monotonic() > deadline:
                raise TimeoutError
            time.sleep(0.02)

    def _problem(self, text: str) -> None:
        if text not in self.report.problems:
            self.report.problems.append(text)


def prepare(directory: Path) -> tuple[dict[str, Path], Path]:
    """Packs and settings for a supervisor."""
    settings = directory / "campaign.toml"
    settings.write_text(SETTINGS)
    return make_packs(directory / "packs"), settings
