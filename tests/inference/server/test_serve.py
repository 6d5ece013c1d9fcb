import asyncio
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import httpx2
import pytest
from starlette.applications import Starlette

from expertd_inference.server import serve
from expertd_inference.server.serve import (
    ServerSettings,
    _with_cors,
    bound_socket,
    read_template,
    url_of,
)
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


def test_settings_that_do_not_fit() -> None:
    with pytest.raises(InvalidInputError, match="There is no chat format 'klingon'"):
        ServerSettings(chat_format="klingon")
    with pytest.raises(InvalidInputError, match="belong together; give both"):
        ServerSettings(https_key=Path("key"))
    with pytest.raises(InvalidInputError, match="--images /nowhere is no directory; name one"):
        ServerSettings(images=Path("/nowhere"))


def test_where_clients_find_it(tmp_path: Path) -> None:
    settings = ServerSettings()
    with bound_socket("127.0.0.1", 0) as bound:
        port = bound.getsockname()[1]
        assert url_of(bound, settings) == f"http://127.0.0.1:{port}"
        secure = ServerSettings(https_cert=Path("cert"), https_key=Path("key"))
        assert url_of(bound, secure) == f"https://127.0.0.1:{port}"
        bound.listen()
        with pytest.raises(InvalidInputError, match=f"cannot listen on 127.0.0.1:{port}: Address"):
            bound_socket("127.0.0.1", port)
    with socket.socket(socket.AF_UNIX) as local:
        local.bind(str(tmp_path / "s"))
        assert url_of(local, settings) == f"unix:{tmp_path}/s"


async def test_pages_of_sites_that_are_told_may_read_answers() -> None:
    assert isinstance(_with_cors(Starlette(), ()), Starlette)
    app = _with_cors(Starlette(), ("https://chat.lab",))
    asks = {
        "Access-Control-Request-Method": "DELETE",
        "Access-Control-Request-Headers": "x-api-key",
    }
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app)) as client:
        for origin, status in (("https://chat.lab", 200), ("https://evil.example", 400)):
            headers = {**asks, "Origin": origin}
            answer = await client.options("http://localhost/v1/files/x", headers=headers)
            assert answer.status_code == status
            allowed = answer.headers.get("access-control-allow-origin")
            assert allowed == (origin if status == 200 else None)
        assert "DELETE" in answer.headers["access-control-allow-methods"]


def test_a_template_that_cannot_be_read(tmp_path: Path) -> None:
    assert read_template(None) is None
    with pytest.raises(InvalidInputError, match=r"The chat template .* cannot be read"):
        read_template(tmp_path / "none.jinja")
