"""Alert rules and dashboards: they parse, they fire, and they ask for what is exported."""

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from prometheus_client.core import Metric

from expertd.settings.config import ServeConfig
from expertd.sight.metrics import StoreMetrics
from expertd_inference.engine.stats import EngineStats
from expertd_inference.server.metrics import ServerMetrics, Times
from expertd_testing.handmade import PAGE, make_pack
from tests.expert_store.in_memory import storing
from tests.promtool import check, needs_promtool

ROOT = Path(__file__).parents[2]
SCRAPE = ROOT / "deploy/prometheus/scrape.yml"
MONITORING = ROOT / "docs/monitoring.md"
# What Prometheus and its client add to every target.
OTHERS = {"up", "process_cpu_seconds_total", "process_resident_memory_bytes"}
EVERYWHERE = {"job", "instance", "le"}
Samples = dict[str, set[str]]


@dataclass(frozen=True)
class Program:
    """What is watched: its files in deploy, and what its alerts and metrics begin with."""

    name: str
    alert: str
    rows: frozenset[str]
    unused: frozenset[str] = frozenset()

    @property
    def rules(self) -> Path:
        return ROOT / f"deploy/prometheus/{self.name}.rules.yml"

    @property
    def tests(self) -> Path:
        return ROOT / f"deploy/prometheus/{self.name}.rules.test.yml"

    def alerts(self) -> dict[str, str]:
        """Name and expression of each; YAML of the one form in which the file is written."""
        found = {}
        for block in self.rules.read_text().split("- alert: ")[1:]:
            name, rest = block.split("\n", 1)
            expression = re.search(r"expr:( [^|\n]+| \|\n(?: {10}.*\n)+)", rest)
            assert expression, name
            found[name] = expression[1].removeprefix(" |\n").strip()
        return found

    def dashboard(self) -> dict[str, Any]:
        path = ROOT / f"deploy/grafana/{self.name}.json"
        parsed: dict[str, Any] = json.loads(path.read_text())
        return parsed

    def expressions(self) -> list[str]:
        """Of all panels and annotations, with values for Grafana's variables."""
        board = self.dashboard()
        found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
        found += [each["expr"] for each in board["annotations"]["list"]]
        return [
            each.replace("$__rate_interval", "1m").replace("$model", "m").replace("$job", ".*")
            .replace("$instance", ".*")
            for each in found
        ]  # fmt: skip

    def queries(self) -> list[str]:
        """What the dashboard's variables ask for."""
        return [
            match[1]
            for each in self.dashboard()["templating"]["list"]
            if (match := re.fullmatch(r"label_values\((.*), \w+\)", each.get("definition", "")))
        ]


DAEMON = Program(
    "expertd",
    "Expertd",
    frozenset({"Hit rates", "Tiers", "Latency", "Prefetch", "Sessions"}),
    frozenset({"expertd_resident_experts"}),
)
SERVER = Program("expert-run", "ExpertRun", frozenset({"Requests", "Latency", "Memory", "Engines"}))
PROGRAMS = pytest.mark.parametrize("program", [DAEMON, SERVER], ids=lambda one: one.name)


async def exported_by(program: Program, folder: Path) -> Samples:
    """The labels of each sample's name."""
    if program is SERVER:
        return labels_of(served().registry.collect())
    async with storing({"m": make_pack(folder / "m")}, 64 * PAGE) as store:
        return labels_of(StoreMetrics(store).collect())


def labels_of(families: Iterable[Metric]) -> Samples:
    samples: Samples = {}
    for family in families:
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    return samples


def served() -> ServerMetrics:
    """Of a server that was asked for everything that is counted."""
    metrics, times = ServerMetrics(), Times(0.0)
    metrics.began("m", 1)
    for _ in range(2):
        metrics.token("m", times, 1.0, 0.5)
    metrics.ended("m", times, 1.0, "stop")
    metrics.failed("m", "StepFailedError")
    metrics.engine_died("m", 0)
    stats = EngineStats(
        executor="",
        reason="",
        num_steps=0,
        num_rows=0,
        rows_mean=0.0,
        num_running=0,
        num_waiting=0,
        prefix_queries=0,
        prefix_hits=0,
        num_preemptions=0,
        kv_tokens=0,
        kv_why="",
        kv_used=0.0,
        native_rows={},
    )
    seat = Mock(total_stats=stats, number=0, is_up=True)
    seat.spec.place = "cpu"
    model = Mock(seats=[seat])
    model.name = "m"
    metrics.models.append(model)
    return metrics


def names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:expertd_|process_|expertd:|vllm:)\w+|\bup\b", expression))


@PROGRAMS
async def test_only_exported_metrics_and_their_labels_are_asked_for(
    program: Program, tmp_path: Path
) -> None:
    exported = await exported_by(program, tmp_path)
    asked = [*program.alerts().values(), *program.expressions(), *program.queries()]
    assert len(asked) > 50
    for expression in asked:
        assert names(expression), expression
        for name in names(expression) - OTHERS:
            assert name in exported, f"{expression} asks for {name}, which nothing exports"
        for name, matchers in re.findall(
            r"\b((?:expertd_|expertd:|vllm:)\w+)\{([^}]*)\}", expression
        ):
            labels = set(re.findall(r"(\w+)\s*[=!]", matchers))
            assert labels <= exported[name] | EVERYWHERE, (expression, labels)
        grouped = {
            label
            for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression)
            for label in group.split(", ")
        }
        have = set().union(*(exported.get(name, set()) for name in names(expression)))
        assert grouped <= have | EVERYWHERE, (expression, grouped)


@PROGRAMS
async def test_all_metrics_are_on_the_dashboard_or_in_a_rule(
    program: Program, tmp_path: Path
) -> None:
    exported = await exported_by(program, tmp_path)
    asked = [*program.alerts().values(), *program.expressions(), *program.queries()]
    shown = set().union(*map(names, asked))
    # prometheus_client tells when each series was made as well.
    suffixes = ("_bucket", "_sum", "_count", "_created")
    plain = {name for name in exported if not name.endswith(suffixes)}
    plain |= {name for name in exported if name.endswith("_bucket")}
    assert plain - shown <= program.unused


@needs_promtool
@PROGRAMS
def test_rules_are_sound_and_each_fires_and_not(program: Program) -> None:
    alerts = program.alerts()
    assert f"{len(alerts)} rules found" in check("check", "rules", program.rules)
    assert "SUCCESS" in check("test", "rules", program.tests)
    tested = program.tests.read_text()
    for name in alerts:
        cases = re.findall(
            rf"- alertname: {name}\n.*?(?=\n      - alertname|\n\n|\Z)", tested, re.S
        )
        firing = [case for case in cases if "exp_alerts" in case]
        assert firing, f"{name} is not seen to fire"


@needs_promtool
def test_the_scrape_configuration_is_sound() -> None:
    assert "SUCCESS" in check("check", "config", SCRAPE)


@needs_promtool
@PROGRAMS
def test_the_dashboard_s_expressions_parse(program: Program, tmp_path: Path) -> None:
    rules = tmp_path / "expressions.yml"
    rows = [
        {"record": f"expression_{number}", "expr": expression}
        for number, expression in enumerate([*program.expressions(), *program.queries()])
    ]
    rules.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rows}]}))
    assert f"{len(rows)} rules found" in check("check", "rules", rules)


@PROGRAMS
def test_the_dashboard_can_be_imported(program: Program) -> None:
    board = program.dashboard()
    variables = {each["name"] for each in board["templating"]["list"]}
    assert {"datasource", "model"} <= variables
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    rows = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    assert program.rows <= set(rows)
    for panel in board["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        for target in panel.get("targets", []):
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables, target["expr"]


@PROGRAMS
def test_every_alert_is_explained(program: Program) -> None:
    explained = re.findall(rf"(?m)^\| `({program.alert}[A-Z]\w+)` \|", MONITORING.read_text())
    assert explained == list(program.alerts())


def test_the_example_s_address_is_the_documented_one() -> None:
    address = re.search(r'(?m)^# metrics = "(.*)"$', (ROOT / "deploy/expertd.toml").read_text())
    assert address
    assert address[1] in SCRAPE.read_text()
    assert ServeConfig(Path("s"), PAGE).metrics is None
