from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest

from expertd_inference.server.accounts import Accounts
from expertd_inference.server.hosting import engine_process, engine_seat
from expertd_inference.server.hosting.engine_child import EngineSpec
from expertd_inference.server.hosting.hosted_model import HostedModel
from expertd_inference.server.metrics import ServerMetrics
from tests.inference.server.hosting.pretended import Stage

Host = Callable[..., HostedModel]


@pytest.fixture
def stage(monkeypatch: pytest.MonkeyPatch) -> Stage:
    """Engines' processes are threads that play its parts."""
    stage = Stage()
    monkeypatch.setattr(engine_process, "_process_of", lambda _: stage.process)
    monkeypatch.setattr(engine_seat, "RETRY_SECONDS", 0.01)
    return stage


@pytest.fixture
def said() -> list[str]:
    """The log's lines."""
    return []


@pytest.fixture
async def host(stage: Stage, said: list[str]) -> AsyncIterator[Host]:
    """Makes a model of such engines; its keywords are EngineSpec's."""
    async with AsyncExitStack() as stack:

        def make(**spec: Any) -> HostedModel:
            model = HostedModel(
                [EngineSpec(model="m", socket=None, **{"reattach_seconds": 0.0, **spec})],
                accounts=Accounts(),
                metrics=ServerMetrics(),
                say=said.append,
            )
            stack.push_async_callback(model.close)
            return model

        yield make
