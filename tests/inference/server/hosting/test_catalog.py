"""Models by name, at a daemon that may not answer."""

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from expertd_inference.server.accounts import Accounts
from expertd_inference.server.hosting import catalog as catalog_module
from expertd_inference.server.hosting.catalog import Catalog
from expertd_inference.server.hosting.engine_child import EngineSpec
from expertd_inference.server.metrics import ServerMetrics
from expertd_inference.server.serve import ServerSettings, check_names
from expertd_inference.server.variants import Variant
from expertd_testing.patience import HANG_SECONDS
from expertstore.errors import InvalidInputError, NotFoundError, UnavailableError
from tests.inference.server.hosting.pretended import Link, Stage


class Daemon:
    """What of an AsyncClient a catalog asks."""

    def __init__(self, *names: str) -> None:
        self.names = names
        self.num_asked = 0
        self.answering = asyncio.Event()
        self.answering.set()
        self.error: Exception | None = None

    async def list_models(self) -> list[Any]:
        self.num_asked += 1
        await self.answering.wait()
        if self.error is not None:
            raise self.error
        return [SimpleNamespace(name=n, pack_path=Path("p"), scheme="4bit") for n in self.names]

    async def close(self) -> None:
        self.answering.set()


@pytest.fixture
def metrics() -> ServerMetrics:
    return ServerMetrics()


@pytest.fixture
async def catalog(metrics: ServerMetrics, tmp_path: Path) -> AsyncIterator[Catalog]:
    made = Catalog(
        [EngineSpec(model="", socket=str(tmp_path))],
        aliases={"lost": "gone"},
        variants={},
        template=None,
        idle_seconds=None,
        accounts=Accounts(),
        metrics=metrics,
        say=lambda _: None,
    )
    await made.client.close()
    yield made
    await made.close()


def daemon_of(catalog: Catalog, *names: str) -> Daemon:
    daemon = Daemon(*names)
    catalog.client = cast("Any", daemon)
    return daemon


async def test_the_daemon_is_asked_once_for_all(
    catalog: Catalog, monkeypatch: pytest.MonkeyPatch
) -> None:
    daemon = daemon_of(catalog, "a")
    await asyncio.gather(*(catalog.find("a") for _ in range(16)))
    assert daemon.num_asked == 1
    monkeypatch.setattr(catalog_module, "LIST_SECONDS", 0.01)
    await asyncio.sleep(0.02)
    daemon.answering.clear()
    # One that stands still holds up nobody who asks for a model that is known.
    finding = [catalog.find("a") for _ in range(16)]
    found = await asyncio.wait_for(asyncio.gather(*finding), HANG_SECONDS)
    assert {entry.name for entry in found} == {"a"}
    assert daemon.num_asked == 2
    unknown = asyncio.create_task(catalog.find("b"))
    await asyncio.sleep(0.05)
    assert not unknown.done()
    daemon.error = UnavailableError("gone")
    daemon.answering.set()
    with pytest.raises(UnavailableError):
        await unknown
    daemon.error = None
    with pytest.raises(NotFoundError, match="name one of: a"):
        await catalog.find("b")


async def test_names_of_models_that_are_not_there_are_not_offered(catalog: Catalog) -> None:
    daemon = daemon_of(catalog, "a")
    with pytest.raises(NotFoundError, match=r"name one of: a\.$"):
        await catalog.find("lost")
    daemon.names = ("a", "gone")
    assert (await catalog.find("lost")).name == "gone"


async def test_an_unloaded_model_is_forgotten(
    catalog: Catalog, metrics: ServerMetrics, stage: Stage
) -> None:
    """By the metrics, too, which would have its series twice once it is loaded again."""

    def loads(link: Link) -> None:
        link.receive()

    stage.parts = [loads]
    daemon = daemon_of(catalog, "a", "b")
    first = await catalog.find("a")
    waiting = asyncio.create_task(first.hosted.ready())
    daemon.names = ("b",)
    assert [entry.name for entry in await catalog.entries()] == ["b"]
    with pytest.raises(NotFoundError, match="There is no model 'a' any more"):
        await asyncio.wait_for(waiting, HANG_SECONDS)
    daemon.names = ("a", "b")
    second = await catalog.find("a")
    assert second.hosted is not first.hosted
    assert {id(model) for model in metrics.models} == {id(one) for one in catalog.loaded}


async def test_names_of_models_that_are_not_there(metrics: ServerMetrics, tmp_path: Path) -> None:
    aliases = {"short": "a", "wrong": "zz", "brief": "v"}
    made = Catalog(
        [EngineSpec(model="", socket=str(tmp_path))],
        aliases=aliases,
        variants={"v": Variant(model="a"), "w": Variant(model="b")},
        template=None,
        idle_seconds=None,
        accounts=Accounts(),
        metrics=metrics,
        say=lambda _: None,
    )
    await made.client.close()
    daemon_of(made, "a")
    said: list[str] = []
    await check_names(made, ServerSettings(aliases=aliases), said.append)
    assert said == [
        "w waits for a model 'b', which the daemon does not have yet",
        "wrong waits for a model 'zz', which the daemon does not have yet",
    ]
    with pytest.raises(InvalidInputError, match=r"--alias wrong=zz names .*; give one of: a\."):
        await check_names(made, ServerSettings(aliases=aliases, is_embedded=True), said.append)
    await made.close()
