"""What Ollama's clients ask about the server and its models."""

import hashlib
import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

import expertstore
from expertd_inference.server.api.errors import ApiError
from expertd_inference.server.api.ollama_request import model_name
from expertd_inference.server.api.requests import read_body
from expertd_inference.server.front import front_of
from expertd_inference.server.hosting.catalog import Entry
from expertstore.errors import PackError

FOREVER = "9999-12-31T23:59:59Z"


class ShowRequest(msgspec.Struct, kw_only=True):
    """The body of ``/api/show``; ``name`` is what older clients send."""

    model: str | None = None
    name: str | None = None
    verbose: bool = False


async def ollama_version(_: Request) -> Response:
    """``GET /api/version``."""
    return _json({"version": expertstore.__version__})


async def tags(request: Request) -> Response:
    """``GET /api/tags``: all models, aliases too."""
    catalog = front_of(request).catalog
    models = []
    for entry in await catalog.entries():
        described = {**_described(entry), "modified_at": _modified(entry.pack)}
        models += [{**_names(name), **described} for name in catalog.named(entry)]
    return _json({"models": models})


async def running(request: Request) -> Response:
    """``GET /api/ps``: models that have an engine."""
    entries = await front_of(request).catalog.entries()
    models = [
        {
            **_names(entry.name),
            **_described(entry),
            "expires_at": FOREVER,
            "size_vram": 0,
            "context_length": entry.hosted.max_tokens or 0,
        }
        for entry in entries
        if entry.hosted.num_engines
    ]
    return _json({"models": models})


async def show(request: Request) -> Response:
    """``POST /api/show``."""
    front = front_of(request)
    body = await read_body(request, ShowRequest, front.say)
    name = body.model or body.name
    if name is None:
        raise ApiError(400, "model is missing; name one.", param="model")
    entry, text = await front.model(model_name(name))
    config = _config(entry.pack)
    template = text.templates
    kind = str(config.get("model_type", ""))
    capabilities = ["completion"]
    if "tools" in template:
        capabilities.append("tools")
    if "thinking" in template or "<think>" in template:
        capabilities.append("thinking")
    if text.sees:
        capabilities.append("vision")
    context = config.get("max_position_embeddings")
    return _json(
        {
            "modelfile": "",
            "parameters": "",
            "license": "",
            "template": template,
            "details": _described(entry)["details"],
            "model_info": {
                "general.architecture": kind,
                "general.basename": entry.name,
                f"{kind}.context_length": entry.hosted.max_tokens or context,
                f"{kind}.embedding_length": config.get("hidden_size"),
                f"{kind}.block_count": config.get("num_hidden_layers"),
            },
            "capabilities": capabilities,
            "modified_at": _modified(entry.pack),
        }
    )


async def manage(request: Request) -> Response:
    """Routes that fetch and change models."""
    raise ApiError(
        501,
        f"{request.url.path} is not served: models are packed and loaded by expertd, and do not "
        "embed texts.",
    )


def _names(name: str) -> dict[str, str]:
    tagged = name if ":" in name else f"{name}:latest"
    return {"name": tagged, "model": tagged}


def _described(entry: Entry) -> dict[str, Any]:
    kind = str(_config(entry.pack).get("model_type", ""))
    return {
        "size": sum(file.stat().st_size for file in entry.pack.iterdir() if file.is_file()),
        "digest": hashlib.sha256(_read(entry.pack / "pack.json")).hexdigest(),
        "details": {
            "parent_model": "",
            "format": "expertd",
            "family": kind,
            "families": [kind],
            "parameter_size": "",
            "quantization_level": entry.scheme,
        },
    }


def _modified(pack: Path) -> str:
    when = datetime.fromtimestamp((pack / "pack.json").stat().st_mtime, UTC)
    return when.isoformat().replace("+00:00", "Z")


def _config(pack: Path) -> dict[str, Any]:
    config: dict[str, Any] = json.loads(_read(pack / "config.json"))
    return config


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except OSError as error:
        raise PackError(f"{file} cannot be read: {error.strerror}.") from error


def _json(value: Any) -> Response:  # noqa: ANN401
    return Response(msgspec.json.encode(value), media_type="application/json")
