"""``/v1/models``, ``/health``, ``/version`` and ``/metrics``: what there is."""

from datetime import UTC, datetime
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import expertstore
from expertd_inference.server.front import Front, front_of
from expertd_inference.server.hosting.catalog import Entry


async def list_models(request: Request) -> Response:
    """``GET /v1/models``: all, variants and aliases too."""
    front = front_of(request)
    entries = await front.catalog.entries()
    data = [one for entry in entries for one in _described(front, entry)]
    # The last three are Anthropic's, whose clients ask at the same path.
    ids = {"first_id": data[0]["id"] if data else None, "last_id": data[-1]["id"] if data else None}
    return _json({"object": "list", "data": data, "has_more": False, **ids})


async def get_model(request: Request) -> Response:
    """``GET /v1/models/{name}``."""
    front = front_of(request)
    name = request.path_params["name"]
    entry = await front.catalog.find(name)
    return _json(_one(entry, name))


async def list_chats(_: Request) -> Response:
    """``GET /v1/chat/completions``: chats that are kept, which none is."""
    ids = {"first_id": None, "last_id": None}
    return _json({"object": "list", "data": [], "has_more": False, **ids})


async def health(request: Request) -> Response:
    """``GET /health``: 200 once it can answer."""
    if front_of(request).stopping:
        return _json({"status": "stopping"}, 503)
    return _json({"status": "ok"})


async def metrics(request: Request) -> Response:
    """``GET /metrics``, as Prometheus reads it."""
    content, kind = front_of(request).metrics.text()
    return Response(content, media_type=kind)


async def version(_: Request) -> Response:
    """``GET /version``."""
    return _json({"version": expertstore.__version__})


def _described(front: Front, entry: Entry) -> list[dict[str, Any]]:
    return [_one(found, name) for name, found in front.catalog.named(entry).items()]


def _one(entry: Entry, name: str) -> dict[str, Any]:
    root = entry if entry.root is None else entry.root
    parent = root if name == entry.name else entry
    return {
        "id": name,
        "object": "model",
        "created": entry.created,
        "owned_by": "expertd",
        "root": root.name,
        "parent": None if name == parent.name else parent.name,
        **_limits(entry),
        # Anthropic's.
        "type": "model",
        "display_name": name,
        "lifecycle": "active",
        "created_at": datetime.fromtimestamp(entry.created, UTC).isoformat(),
    }


def _limits(entry: Entry) -> dict[str, int]:
    """By vLLM's name and Anthropic's; an engine that has not started yet has not said."""
    most = entry.hosted.max_tokens
    if most is None:
        return {}
    return {"max_model_len": most, "max_input_tokens": most - 1, "max_tokens": most - 1}


def _json(value: Any, status: int = 200) -> Response:  # noqa: ANN401
    return Response(msgspec.json.encode(value), status, media_type="application/json")
