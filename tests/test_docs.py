"""The pages of docs: made freshly where they are made, and true to the source they quote."""

import ast
import dataclasses
import importlib.util
import json
import re
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from expertd.settings.config import ServeConfig
from expertd_client.base_session import BaseSession
from expertd_inference.cli.many import PromptResult, Totals
from expertd_inference.device.stats import DeviceStats
from expertd_inference.engine.engine import EngineStats
from expertd_inference.experts.hints import HintStats
from expertd_inference.generation import GenerationResult
from expertd_inference.settings import GenerationSettings

ROOT = Path(__file__).parent.parent
SOURCES = ("proto", "expert_store", "client", "inference")
GAP = "…"


def script(name: str) -> Any:
    """A script of docs, as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / f"docs/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_rpc_reference_is_what_the_proto_says() -> None:
    page = script("rpc_reference").render(ROOT / "proto/expertstore/v1/expert_store.proto")
    assert (ROOT / "docs/rpc.md").read_text() == page, "docs/rpc.md is stale: run make proto"


def test_the_sizes_are_the_packer_s() -> None:
    page = (ROOT / "docs/choosing.md").read_text()
    made = script("model_sizes").render(page)
    assert made == page, "stale: run python docs/model_sizes.py docs/choosing.md"


def fields_of(kind: type) -> set[str]:
    if dataclasses.is_dataclass(kind):
        return {each.name for each in dataclasses.fields(kind)}
    if issubclass(kind, msgspec.Struct):
        return {each.name for each in msgspec.structs.fields(kind)}
    return {name for name in kind.__annotations__ if not name.startswith("_")}


# What a field is called where a person writes it.
IN_TOML = {
    "ram_bytes": "ram",
    "table_ram_bytes": "table_ram",
    "models": "[models]",
    "quotas": "[quotas]",
    "default_quota_bytes": "default_quota",
    "page_cache_bytes": "page_cache",
    "read_buffer_bytes": "read_buffer",
    "tcp": "[tcp]",
}


@pytest.mark.parametrize(
    ("kind", "page"),
    [
        (GenerationResult, "generating"),
        (HintStats, "generating"),
        (EngineStats, "generating"),
        (Totals, "generating"),
        (PromptResult, "generating"),
        (GenerationSettings, "generating"),
        (DeviceStats, "gpu"),
        (BaseSession, "client"),
        (ServeConfig, "operating"),
    ],
)
def test_every_field_is_documented(kind: type, page: str) -> None:
    text = (ROOT / f"docs/{page}.md").read_text()
    names = {IN_TOML.get(name, name) if kind is ServeConfig else name for name in fields_of(kind)}
    assert names
    assert not {name for name in names if f"`{name}`" not in text}


def test_every_field_of_a_message_is_described() -> None:
    rows = re.findall(
        r"(?m)^\| \d+ \| `(\w+)` \| [^|]* \| (.*) \|$", (ROOT / "docs/rpc.md").read_text()
    )
    assert len(rows) > 100
    assert not [name for name, text in rows if not text.strip()]


def test_every_page_is_in_the_index() -> None:
    listed = set(re.findall(r"^([a-z-]+)$", (ROOT / "docs/index.md").read_text(), re.MULTILINE))
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")} - {"index"}
    assert pages == listed & pages
    assert listed == pages


READS: dict[str, Callable[[str], Any]] = {
    "python": lambda text: compile(text, "a recipe", "exec"),
    "json": json.loads,
    "toml": tomllib.loads,
    "yaml": yaml.safe_load,
}


def test_what_recipes_say_can_be_read() -> None:
    page = (ROOT / "docs/recipes.md").read_text()
    blocks = re.findall(r"(?ms)^```(\w+)\n(.*?)^```$", page)
    assert {kind for kind, _ in blocks} <= {*READS}
    assert all(READS[kind](text) for kind, text in blocks)
    assert all("127.0.0.1:8080" in text for _, text in blocks)


@pytest.mark.parametrize("name", ["serving", "batch", "server", "answers", "recipes"])
def test_a_page_of_the_server_is_read_in_minutes(name: str) -> None:
    assert len((ROOT / f"docs/{name}.md").read_text().split()) < 1200


def quoted() -> list[str]:
    page = (ROOT / "docs/troubleshooting.md").read_text()
    return re.findall(r"^> (.*)$", page, re.MULTILINE)


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """All that the source may say, with gaps for what is put in."""
    found = []
    for package in SOURCES:
        for file in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
                elif isinstance(node, ast.JoinedStr):
                    parts = (
                        part.value if isinstance(part, ast.Constant) else GAP
                        for part in node.values
                    )
                    found.append("".join(map(str, parts)))
    return found


@pytest.mark.parametrize("message", quoted())
def test_a_message_in_troubleshooting_is_one_of_ours(message: str, sentences: list[str]) -> None:
    pieces = [piece.strip(" ,;:") for piece in message.split(GAP)]
    pattern = re.compile(".*".join(re.escape(piece) for piece in pieces if piece), re.DOTALL)
    assert any(pattern.search(sentence) for sentence in sentences), message
