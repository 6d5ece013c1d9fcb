"""Processes that decode from one tier or another, and what is measured of them in turns."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.memory_limit import MemoryLimit

Job = Mapping[str, object]
"""What :class:`bench.tier_worker.Decoder` is made of."""

_ROOT = Path(__file__).resolve().parent.parent


class TierProcess:
    """One process that answers a line of JSON with a line of JSON. Raises EndedError if it ends."""

    def __init__(self, command: Sequence[str], limit: MemoryLimit | None = None) -> None:
        """Waits until it is ready; ``limit`` is joined first of all."""
        if limit is not None:
            joined = f'echo $$ > "{limit.joined_by}" && exec "$@"'
            command = ["sh", "-c", joined, "sh", *command]
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=_ROOT,
            # Threads that wait must not take the cores from those that read.
            env={**os.environ, "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"},
        )
        self.read()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def is_running(self) -> bool:
        """Whether it can be asked."""
        return self._process.poll() is None

    def ask(self, line: str) -> Any:  # noqa: ANN401 - JSON
        """The answer to ``line``."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(f"{line}\n")
            self._process.stdin.flush()
        except BrokenPipeError as error:
            raise EndedError from error
        return self.read()

    def do(self, name: str, verb: str, **arguments: object) -> Any:  # noqa: ANN401 - JSON
        """As the :class:`bench.tier_worker.Decoder` of that name does."""
        return self.ask(json.dumps([name, verb, arguments]))

    def read(self) -> Any:  # noqa: ANN401 - JSON
        """The next line of its stdout."""
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise EndedError
        return json.loads(line)

    def close(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.communicate()


class EndedError(Exception):
    """A process ended; what it said is on stderr."""


def workers(jobs: Mapping[str, Job], limit: MemoryLimit | None = None) -> TierProcess:
    """A :mod:`bench.tier_worker` with a decoder for each."""
    command = [sys.executable, "-m", "bench.tier_worker", json.dumps(jobs, default=str)]
    return TierProcess(command, limit)


@dataclass
class Tally:
    """What one process did in all its turns."""

    speeds: list[float] = field(default_factory=list)
    """Tokens per second of each turn."""
    bounds: list[float] = field(default_factory=list)
    """What the disk allows for the bytes that the turn read."""
    num_bytes: list[float] = field(default_factory=list)
    """Read per token, of each turn."""
    waited: list[float] = field(default_factory=list)
    """Experts per token that had to be read first, of each turn."""
    hints: dict[str, int] = field(default_factory=dict)
    executor: str = ""
    """What computed the tokens."""

    def add(self, answer: dict[str, Any], rate: float) -> None:
        """One turn, and the bytes per second that the disk gave in those seconds."""
        seconds = answer["seconds"]
        self.executor = answer.get("executor", "")
        per_token = sum(answer["bytes"]) / len(seconds)
        self.speeds.append(len(seconds) / sum(seconds))
        self.num_bytes.append(per_token)
        self.bounds.append(rate / per_token if per_token else float("inf"))
        if waited := answer.get("waited"):
            self.waited.append(sum(waited) / len(waited))
        for name, count in answer.get("hints", {}).items():
            self.hints[name] = self.hints.get(name, 0) + count

    @property
    def recall(self) -> float:
        """Of the hinted experts whose layer has come, how many were needed."""
        return 1 - self.hints["wasted"] / self._num_known

    @property
    def hints_text(self) -> str:
        """What became of the hints; empty if there were none."""
        if not self._num_known:
            return ""
        names = ("useful", "late", "wasted")
        return ", ".join(f"{self.hints[name] / self._num_known:.0%} {name}" for name in names)

    @property
    def _num_known(self) -> int:
        return sum(self.hints.get(name, 0) for name in ("useful", "late", "wasted"))


def slower_ways(tallies: Mapping[Any, Tally]) -> Iterator[str]:
    """A sentence for each that did not decode by a program, as a worker of that model would."""
    for name, tally in tallies.items():
        if tally.executor not in ("", "program"):
            yield f"{name}: tokens were computed by {tally.executor}, which is slower"
