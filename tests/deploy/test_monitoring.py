"""Alert rules and dashboard: they parse, they fire, and they ask for what the daemon exports."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from expertd.settings.config import ServeConfig
from expertd.sight.metrics import StoreMetrics
from expertd_testing.handmade import PAGE, make_pack
from tests.expert_store.in_memory import storing
from tests.promtool import check, needs_promtool

ROOT = Path(__file__).parents[2]
RULES = ROOT / "deploy/prometheus/expertd.rules.yml"
TESTS = ROOT / "deploy/prometheus/expertd.rules.test.yml"
SCRAPE = ROOT / "deploy/prometheus/scrape.yml"
DASHBOARD = ROOT / "deploy/grafana/expertd.json"
MONITORING = ROOT / "docs/monitoring.md"
# What Prometheus and its client add to every target.
OTHERS = {"up", "process_cpu_seconds_total", "process_resident_memory_bytes"}
EVERYWHERE = {"job", "instance", "le"}


@pytest.fixture
async def exported(tmp_path: Path) -> dict[str, set[str]]:
    """The labels of each sample's name."""
    samples: dict[str, set[str]] = {}
    async with storing({"m": make_pack(tmp_path / "m")}, 64 * PAGE) as store:
        for family in StoreMetrics(store).collect():
            for sample in family.samples:
                samples.setdefault(sample.name, set()).update(sample.labels)
    return samples


def alerts() -> dict[str, str]:
    """Name and expression of each; YAML of the one form in which the file is written."""
    found = {}
    for block in RULES.read_text().split("- alert: ")[1:]:
        name, rest = block.split("\n", 1)
        expression = re.search(r"expr:( [^|\n]+| \|\n(?: {10}.*\n)+)", rest)
        assert expression, name
        found[name] = expression[1].removeprefix(" |\n").strip()
    return found


def dashboard() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(DASHBOARD.read_text())
    return parsed


def expressions() -> list[str]:
    """Of all panels and annotations, with values for Grafana's variables."""
    board = dashboard()
    found = [target["expr"] for panel in board["panels"] for target in panel.get("targets", [])]
    found += [each["expr"] for each in board["annotations"]["list"]]
    return [
        each.replace("$__rate_interval", "1m").replace("$model", "m").replace("$job", ".*")
        .replace("$instance", ".*")
        for each in found
    ]  # fmt: skip


def queries() -> list[str]:
    """What the dashboard's variables ask for."""
    return [
        match[1]
        for each in dashboard()["templating"]["list"]
        if (match := re.fullmatch(r"label_values\((.*), \w+\)", each.get("definition", "")))
    ]


def names(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:expertd|process)_\w+|\bup\b", expression))


async def test_only_exported_metrics_and_their_labels_are_asked_for(
    exported: dict[str, set[str]],
) -> None:
    asked = [*alerts().values(), *expressions(), *queries()]
    assert len(asked) > 50
    for expression in asked:
        assert names(expression), expression
        for name in names(expression) - OTHERS:
            assert name in exported, f"{expression} asks for {name}, which nothing exports"
        for name, matchers in re.findall(r"\b(expertd_\w+)\{([^}]*)\}", expression):
            labels = set(re.findall(r"(\w+)\s*[=!]", matchers))
            assert labels <= exported[name] | EVERYWHERE, (expression, labels)
        grouped = {
            label
            for group in re.findall(r"\b(?:by|on) \(([^)]*)\)", expression)
            for label in group.split(", ")
        }
        have = set().union(*(exported.get(name, set()) for name in names(expression)))
        assert grouped <= have | EVERYWHERE, (expression, grouped)


async def test_all_metrics_are_on_the_dashboard_or_in_a_rule(
    exported: dict[str, set[str]],
) -> None:
    shown = set().union(*map(names, [*alerts().values(), *expressions(), *queries()]))
    suffixes = ("_bucket", "_sum", "_count")
    plain = {name for name in exported if not name.endswith(suffixes)}
    plain |= {name for name in exported if name.endswith("_bucket")}
    assert plain - shown <= {"expertd_resident_experts"}


@needs_promtool
def test_rules_are_sound_and_each_fires_and_not() -> None:
    assert f"{len(alerts())} rules found" in check("check", "rules", RULES)
    assert "SUCCESS" in check("test", "rules", TESTS)
    tested = TESTS.read_text()
    for name in alerts():
        cases = re.findall(
            rf"- alertname: {name}\n.*?(?=\n      - alertname|\n\n|\Z)", tested, re.S
        )
        firing = [case for case in cases if "exp_alerts" in case]
        assert firing, f"{name} is not seen to fire"


@needs_promtool
def test_the_scrape_configuration_is_sound() -> None:
    assert "SUCCESS" in check("check", "config", SCRAPE)


@needs_promtool
def test_the_dashboard_s_expressions_parse(tmp_path: Path) -> None:
    rules = tmp_path / "expressions.yml"
    rows = [
        {"record": f"expression_{number}", "expr": expression}
        for number, expression in enumerate([*expressions(), *queries()])
    ]
    rules.write_text(json.dumps({"groups": [{"name": "dashboard", "rules": rows}]}))
    assert f"{len(rows)} rules found" in check("check", "rules", rules)


def test_the_dashboard_can_be_imported() -> None:
    board = dashboard()
    variables = {each["name"] for each in board["templating"]["list"]}
    assert {"datasource", "model"} <= variables
    numbers = [panel["id"] for panel in board["panels"]]
    assert len(set(numbers)) == len(numbers)
    rows = [panel["title"] for panel in board["panels"] if panel["type"] == "row"]
    assert {"Hit rates", "Tiers", "Latency", "Prefetch", "Sessions"} <= set(rows)
    for panel in board["panels"]:
        if panel["type"] != "row":
            assert panel["datasource"]["uid"] == "${datasource}", panel["title"]
        for target in panel.get("targets", []):
            used = set(re.findall(r"\$(\w+)", target["expr"])) - {"__rate_interval"}
            assert used <= variables, target["expr"]


def test_every_alert_is_explained() -> None:
    explained = re.findall(r"(?m)^\| `(Expertd\w+)` \|", MONITORING.read_text())
    assert explained == list(alerts())


def test_the_example_s_address_is_the_documented_one() -> None:
    address = re.search(r'(?m)^# metrics = "(.*)"$', (ROOT / "deploy/expertd.toml").read_text())
    assert address
    assert address[1] in SCRAPE.read_text()
    assert ServeConfig(Path("s"), PAGE).metrics is None
