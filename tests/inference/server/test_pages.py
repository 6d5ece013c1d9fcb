"""The pages' files, and what the page of the host is told."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from types import SimpleNamespace

import httpx2
import pytest
from starlette.requests import Request

from expertd_inference.server.accounts import Accounts
from expertd_inference.server.api import host
from expertd_inference.server.app import make_app
from expertd_inference.server.front import Front
from expertd_inference.server.guard import Guard
from expertd_inference.server.hosting.catalog import Catalog
from expertd_inference.server.hosting.engine_child import EngineSpec
from expertd_inference.server.keys import Keys, digest
from expertd_inference.server.metrics import ServerMetrics
from expertd_inference.server.pages.files import PAGE_FILES

MOST_BYTES = 64 << 10
"""Of all pages together."""
SOURCES = {file.name: file.read_text() for file in PAGE_FILES.values()}
STYLE = SOURCES["style.css"]


@asynccontextmanager
async def serving(tmp_path: Path) -> AsyncIterator[httpx2.AsyncClient]:
    """A server with keys whose daemon is away, without a process of its own."""
    path = tmp_path / "keys.toml"
    path.write_text(f'[keys.alice]\nsha256 = "{digest("ek-alice")}"\n')
    accounts, metrics = Accounts(), ServerMetrics()
    catalog = Catalog(
        [EngineSpec(model="", socket=str(tmp_path / "daemon"))],
        aliases={},
        template=None,
        idle_seconds=None,
        accounts=accounts,
        metrics=metrics,
        say=lambda _: None,
    )
    app = make_app(Front(catalog, metrics, lambda _: None))
    guard = Guard(app, keys=Keys(path), accounts=accounts, origins=(), say=lambda _: None)
    transport = httpx2.ASGITransport(app=guard)
    try:
        async with httpx2.AsyncClient(transport=transport, base_url="http://here") as client:
            yield client
    finally:
        await catalog.close()


async def test_pages_are_open_and_strict(tmp_path: Path) -> None:
    assert {"/", "/host", "/pages/chat.js", "/pages/style.css"} <= PAGE_FILES.keys()
    async with serving(tmp_path) as client:
        for path, file in PAGE_FILES.items():
            answer = await client.get(path)
            assert answer.status_code == 200
            assert answer.content == file.read_bytes()
            policy = answer.headers["content-security-policy"]
            assert policy.startswith("default-src 'self';")
            assert "unsafe" not in policy
            assert answer.headers["x-content-type-options"] == "nosniff"
            again = await client.get(path, headers={"if-none-match": answer.headers["etag"]})
            assert (again.status_code, again.content) == (304, b"")
        assert (
            (await client.get("/pages/chat.js"))
            .headers["content-type"]
            .startswith("text/javascript")
        )
        for path in ("/pages/files.py", "/pages/../files.py", "/pages/"):
            assert (await client.get(path)).status_code == 401


async def test_the_host_s_state_needs_a_key_and_says_that_the_daemon_is_away(
    tmp_path: Path,
) -> None:
    async with serving(tmp_path) as client:
        assert (await client.get("/host/state")).status_code == 401
        answer = await client.get("/host/state", headers={"x-api-key": "ek-alice"})
    state = answer.json()
    assert state["daemon"] is state["heat"] is None
    assert str(tmp_path / "daemon") in state["away"]
    assert state["models"] == []


def test_the_host_s_state(http: httpx2.Client) -> None:
    before = _example(http.get("/host/state").json())
    asked = {"prompt": [40], "max_tokens": 5, "ignore_eos": True}
    http.post("/v1/completions", json=asked).raise_for_status()
    state = http.get("/host/state?heat=example").json()
    after = _example(state)
    assert after["tokens"] - before["tokens"] == 5
    assert after["steps"] > before["steps"]
    assert after["executor"]
    assert after["pid"] is not None
    assert after["running"] == after["waiting"] == 0
    assert state["time"] > 0
    daemon = state["daemon"]
    (model,) = daemon["models"]
    assert state["away"] is None
    assert [session["role"] for session in daemon["sessions"]] == ["worker"]
    layers = state["heat"]
    assert sum(len(layer["heat"]) for layer in layers) == model["num_experts"]
    assert sum(sum(layer["resident"]) for layer in layers) == model["num_resident"]
    assert max(max(layer["heat"]) for layer in layers) == 255
    assert http.get("/host/state?heat=other").json()["heat"] is None


def _example(state: dict[str, object]) -> dict[str, int]:
    models = state["models"]
    assert isinstance(models, list)
    (model,) = models
    assert model["name"] == "example"
    (engine,) = model["engines"]
    assert engine["place"] == "cpu"
    return {"tokens": model["tokens"], **engine}


def test_pages_are_small_and_refer_to_themselves_only() -> None:
    assert sum(len(text.encode()) for text in SOURCES.values()) < MOST_BYTES
    for name, text in SOURCES.items():
        if name.endswith(".html"):
            for target in re.findall(r'\b(?:src|href)="([^"#]+)"', text):
                assert f"/{target.removeprefix('./')}" in PAGE_FILES, f"{name}: {target}"
            assert not re.search(r"<script(?![^>]* src=)|<style|\bon\w+=|style=", text), name
        if name.endswith(".js"):
            for target in re.findall(r'from "\./([^"]+)"', text):
                assert target in SOURCES, f"{name}: {target}"
            assert not re.search(r"innerHTML|outerHTML|insertAdjacent|document\.write|eval\(", text)
        assert not re.search(r"url\(|@import", text), name


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_words_stand_out_from_what_is_behind_them(scheme: str) -> None:
    roots = re.findall(r":root \{(.*?)\}", STYLE, re.DOTALL)
    colours: dict[str, str] = {}
    for block in roots[: 1 if scheme == "light" else 2]:
        colours |= dict(re.findall(r"--([\w-]+): (#\w{6});", block))
    pairs = [(front, back) for front in ("text", "muted", "accent", "bad", "string", "number")
             for back in ("page", "panel")]  # fmt: skip
    for front, back in [*pairs, ("on-accent", "accent")]:
        ratio = _contrast(colours[front], colours[back])
        assert ratio >= 4.5, f"{front} on {back} has {ratio:.1f}, WCAG's AA wants 4.5"


def _contrast(one: str, other: str) -> float:
    """Of WCAG 2: 1 to 21."""
    darker, lighter = sorted(map(_luminance, (one, other)))
    return (lighter + 0.05) / (darker + 0.05)


def _luminance(colour: str) -> float:
    parts = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [one / 12.92 if one <= 0.04045 else ((one + 0.055) / 1.055) ** 2.4 for one in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


async def test_the_host_s_state_while_a_daemon_does_not_answer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(host, "DAEMON_SECONDS", 0.01)

    async def never() -> None:
        await asyncio.Event().wait()

    spec = SimpleNamespace(place="cpu")
    seat = SimpleNamespace(
        spec=spec, pid=None, num_deaths=3, total_stats=None, sequences={1: None, 2: None}
    )
    hosted = SimpleNamespace(name="m", num_tokens=0, seats=[seat])
    front = SimpleNamespace(catalog=SimpleNamespace(entries=never, loaded=[hosted]))
    app = SimpleNamespace(state=SimpleNamespace(front=front))
    request = Request({"type": "http", "query_string": b"", "headers": [], "app": app})
    state = json.loads((await host.host_state(request)).body)
    assert state["away"] == "The daemon has not answered within 0.01 s."
    (engine,) = state["models"][0]["engines"]
    assert (engine["waiting"], engine["deaths"], engine["pid"]) == (2, 3, None)
