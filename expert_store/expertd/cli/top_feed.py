"""Where ``expertd top`` gets its figures: a thread that watches a daemon, also one to come."""

import queue
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from expertd.cli.admin import CALL_SECONDS
from expertd.residency.heat_map import HeatMap
from expertd_client import Client
from expertstore.errors import NotFoundError, UnavailableError

_RETRY_SECONDS = 0.5


@dataclass(frozen=True)
class Sample:
    """What one interval brought."""

    stats: dict[str, Any]
    model: str
    """Whose heat; empty if no model is loaded."""
    heat: HeatMap | None


@dataclass(frozen=True)
class Waiting:
    """No daemon answers, for this reason."""

    error: UnavailableError


@dataclass(frozen=True)
class Failed:
    """Something else than waiting helps: the user has to know."""

    error: Exception


Event = Sample | Waiting | Failed


class Feed:
    """Samples of the daemon in ``directory``, one an interval; a context manager."""

    def __init__(self, directory: Path, model: str, interval_seconds: float) -> None:
        self.model = model
        """Whose heat is wanted; empty: the first one's."""
        self._directory, self._interval = directory, interval_seconds
        self._events: queue.Queue[Event] = queue.Queue(maxsize=2)
        self._closing = threading.Event()
        self._daemon: Client | None = None
        self._thread = threading.Thread(target=self._run, name="expertd-top", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._closing.set()
        if self._daemon is not None:
            self._daemon.close()
        self._thread.join(1.0)

    def next(self, timeout_seconds: float) -> Event | None:
        """The next event; None if there is none in that time."""
        try:
            return self._events.get(timeout=timeout_seconds)
        except queue.Empty:
            return None

    def _run(self) -> None:
        seen = False
        while not self._closing.is_set():
            try:
                # A new channel each time: an old one pauses longer after each failure.
                with Client(self._directory, timeout_seconds=CALL_SECONDS) as self._daemon:
                    for stats in self._daemon.watch_stats(self._interval):
                        seen = True
                        self._tell(self._sample(self._daemon, stats))
            except UnavailableError as error:
                # A daemon that was there comes back, and one may be about to start; a directory
                # that is not there is a mistake in its name.
                if not seen and not self._directory.exists():
                    self._tell(Failed(error))
                    return
                self._tell(Waiting(error))
            except Exception as error:
                if self._closing.is_set():
                    return  # what a closed channel raises
                self._tell(Failed(error))
                return
            self._closing.wait(_RETRY_SECONDS)

    def _sample(self, daemon: Client, stats: dict[str, Any]) -> Sample:
        names = [model["name"] for model in stats["models"]]
        wanted = self.model
        model = wanted if wanted in names else next(iter(names), "")
        try:
            return Sample(stats, model, HeatMap.of(daemon.get_heat(model)) if model else None)
        except NotFoundError:  # unloaded in between
            return Sample(stats, "", None)

    def _tell(self, event: Event) -> None:
        while not self._closing.is_set():
            try:
                self._events.put(event, timeout=0.2)
                return
            except queue.Full:
                # A viewer that was stopped wants to see now, not then.
                try:
                    self._events.get_nowait()
                except queue.Empty:
                    time.sleep(0)
