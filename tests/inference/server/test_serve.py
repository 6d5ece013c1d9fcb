import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest

from expertd_inference.server import serve
from expertd_inference.server.serve import ServerSettings
from expertstore.errors import InvalidInputError


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "lab"])
def test_others_may_ask_only_with_keys_or_if_that_is_said(host: str) -> None:
    with pytest.raises(InvalidInputError, match="is open to other hosts"):
        ServerSettings(host=host)
    ServerSettings(host=host, no_auth=True)
    with pytest.raises(InvalidInputError, match=r"The socket unit's address .* is open"):
        ServerSettings().check_address(host, f"The socket unit's address {host}")


@pytest.mark.parametrize("host", ["127.0.0.1", "::1", "localhost"])
def test_this_host_may_ask(host: str) -> None:
    assert ServerSettings(host=host).host == host


async def test_the_tokenizer_is_loaded_while_the_engine_starts() -> None:
    """Each waits here for the other to have begun."""
    loading, starting = asyncio.Event(), asyncio.Event()

    class Hosted:
        seats = ()

        async def ready(self) -> list[Any]:
            starting.set()
            await loading.wait()
            return []

    entry = SimpleNamespace(name="m", hosted=Hosted())

    class Catalog:
        async def entries(self) -> list[Any]:
            return [entry]

        async def text(self, _: object) -> None:
            loading.set()
            await starting.wait()

    async with asyncio.timeout(10):
        assert await serve._preload(cast("Any", Catalog()), ()) == "m ()"
