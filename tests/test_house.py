"""The house: imports point one way, links lead somewhere, commands are documented as they are."""

import ast
import re
from pathlib import Path

import pytest

from expertd.settings.config import load_config

ROOT = Path(__file__).parent.parent
PACKAGES = {
    "expertstore": ROOT / "proto/expertstore",
    "expertd_client": ROOT / "client/expertd_client",
    "expertd": ROOT / "expert_store/expertd",
    "expertd_inference": ROOT / "inference/expertd_inference",
}
ORDER = list(PACKAGES)
STARTS_A_DAEMON = {"advice", "embedded.py", "embedded_child.py"}
"""What of the worker may import the daemon: it starts one, or plans what one would hold."""
# From the ground up; README.md says what each holds. Other modules are used from everywhere.
FLOORS = {
    "expertd": [
        "settings",
        "memory",
        "disk",
        "residency",
        "traces",
        "tables",
        "hosting",
        "manager",
        "store",
        "serving",
        "sight",
        "daemon",
        "doctor",
        "cli",
    ],
    "expertd_client": [
        "endpoint",
        "address",
        "mapping",
        "attachment",
        "base_session",
        "session",
        "aio",
        "client",
    ],
    "expertd_inference": [
        "process",
        "kernels",
        "kv",
        "experts",
        "device",
        "model",
        "execution",
        "engine",
        "worker",
        "generation",
        "server",
        "advice",
        "cli",
    ],
}
TORCH = {"torch", "transformers", "hqq", "safetensors", "accelerate"}


@pytest.mark.parametrize("package", ORDER)
def test_imports_point_one_way(package: str) -> None:
    above = set(ORDER[ORDER.index(package) + 1 :])
    for file in PACKAGES[package].rglob("*.py"):
        assert not imports_of(file) & above, f"{file} imports from a package above it"


def test_a_worker_knows_no_daemon_but_the_one_that_it_starts() -> None:
    package = PACKAGES["expertd_inference"]
    for file in package.rglob("*.py"):
        if not STARTS_A_DAEMON & set(file.relative_to(package).parts):
            assert "expertd" not in imports_of(file), f"{file} imports the daemon"


@pytest.mark.parametrize(
    ("package", "floor"), [(package, floor) for package in FLOORS for floor in FLOORS[package]]
)
def test_imports_inside_a_package_point_down(package: str, floor: str) -> None:
    above = FLOORS[package][FLOORS[package].index(floor) + 1 :]
    place = PACKAGES[package] / floor
    files = [*place.rglob("*.py")] or [place.with_suffix(".py")]
    for file in files:
        for name in re.findall(
            rf"^\s*(?:from|import) {package}\.(\w+)", file.read_text(), re.MULTILINE
        ):
            assert name not in above, f"{file} imports from {name}, which stands above it"


def test_only_packing_and_inference_know_torch() -> None:
    for package in ("expertstore", "expertd", "expertd_client"):
        for file in PACKAGES[package].rglob("*.py"):
            if "packing" not in file.parts and file.name not in {"codec.py", "rows.py"}:
                assert not imports_of(file) & TORCH, f"{file} imports torch or what needs it"


def test_the_front_knows_no_torch() -> None:
    for file in (PACKAGES["expertd_inference"] / "server").rglob("*.py"):
        if file.name != "engine_child.py":
            assert not imports_of(file) & TORCH, f"{file} imports torch or what needs it"


@pytest.mark.parametrize(
    "page", [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("examples/*/*.md")], ids=str
)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page} links to {target}"


def test_the_commented_settings_are_the_defaults(tmp_path: Path) -> None:
    text = (ROOT / "deploy/expertd.toml").read_text()
    uncommented = tmp_path / "all.toml"
    text = text.replace('"alice"', "1000")  # whom this host need not have
    uncommented.write_text(re.sub(r"(?m)^# (\w+ = )", r"\1", text))
    shipped, spelled_out = load_config(ROOT / "deploy/expertd.toml"), load_config(uncommented)
    for name in vars(shipped):
        if name not in {
            "allowed_uids",
            "writable_uids",
            "default_quota_bytes",
            "page_cache_bytes",
            "table_ram_bytes",
            "quotas",
            "metrics",
            "models",
        }:
            assert getattr(shipped, name) == getattr(spelled_out, name), name


def test_the_log_s_events_are_documented_as_they_are() -> None:
    levels = {"log": "info", "log_warning": "warning", "log_error": "error"}
    written: dict[str, tuple[str, set[str]]] = {
        "unexpected failure": ("error", {"doing", "traceback"})  # log_failure
    }
    for file in PACKAGES["expertd"].rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                level = levels.get(node.func.id)
                if level and node.args and isinstance(node.args[0], ast.Constant):
                    event = node.args[0].value
                    fields = {keyword.arg or "**" for keyword in node.keywords}
                    fields |= written.get(event, ("", set()))[1]
                    assert written.get(event, (level,))[0] == level, event
                    written[event] = (level, fields)
    table = re.findall(
        r"(?m)^\| `([^`]+)` \| (info|warning|error) \| ([^|]*) \|",
        (ROOT / "docs/operating.md").read_text(),
    )
    documented = {row[0]: (row[1], set(re.findall(r"`(\w+)`", row[2]))) for row in table}
    assert written == documented


def imports_of(file: Path) -> set[str]:
    """Top-level names that a file imports, wherever in it."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module.split(".")[0])
    return names
