"""What is to happen in a campaign, and what did."""

from dataclasses import asdict, dataclass, field
from typing import Any

from tests.serve_campaign.stock import Stock


@dataclass(frozen=True)
class Plan:
    """What is to happen."""

    engine_kills: int
    daemon_kills: int
    clients: int
    seed: int
    reloads: int = 5
    fork_server_kills: int = 3
    successions: int = 3
    server_kills: int = 3

    @property
    def total(self) -> int:
        """Of all that happens."""
        kills = self.engine_kills + self.daemon_kills + self.fork_server_kills
        return kills + self.reloads + self.successions + self.server_kills


@dataclass
class Report:
    """What did happen, and what should not have."""

    plan: Plan
    kills: dict[str, int] = field(default_factory=dict)
    answers: int = 0
    events: int = 0
    retried: int = 0
    """Requests that were asked while the model was unloaded, and again afterwards."""
    preemptions: int = 0
    wrong: int = 0
    failed: int = 0
    seconds: float = 0.0
    pause_seconds: list[float] = field(default_factory=list)
    """From an engine's end to the next token of any client."""
    stocks: dict[str, Stock] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return not self.problems

    @property
    def done(self) -> int:
        """Of the plan's total."""
        return sum(self.kills.values())

    def as_json(self) -> dict[str, Any]:
        return {**asdict(self), "passed": self.passed}

    def count(self, what: str) -> None:
        """One more that happened."""
        self.kills[what] = self.kills.get(what, 0) + 1

    def problem(self, text: str) -> None:
        """Something that should not have been; each is told once."""
        if text not in self.problems:
            self.problems.append(text)
