"""A server for one batch, in this process and without a port."""

from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

from expertd_inference.server.accounts import Accounts
from expertd_inference.server.app import make_app
from expertd_inference.server.batches.app_door import AppDoor
from expertd_inference.server.front import Front
from expertd_inference.server.hosting.catalog import Catalog
from expertd_inference.server.hosting.engine_child import EngineSpec
from expertd_inference.server.metrics import ServerMetrics
from expertd_inference.server.serve import read_template


@asynccontextmanager
async def own_door(
    spec: EngineSpec, template: Path | None, say: Callable[[str], None]
) -> AsyncGenerator[AppDoor]:
    """The way to the models of the daemon that ``spec`` names, until the block ends."""
    metrics = ServerMetrics()
    catalog = Catalog(
        [spec],
        aliases={},
        template=read_template(template),
        idle_seconds=None,
        accounts=Accounts(),
        metrics=metrics,
        say=say,
    )
    try:
        await catalog.entries()  # A daemon that is not there is not waited for.
        yield AppDoor(make_app(Front(catalog, metrics, say, request_templates=True)))
    finally:
        await catalog.close()
