"""The application: which function answers which path."""

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from expertd_inference.server.api import (
    anthropic,
    llama,
    ollama,
    ollama_models,
    responses,
    tokenizing,
)
from expertd_inference.server.api.batches import (
    cancel_batch,
    create_batch,
    get_batch,
    list_batches,
)
from expertd_inference.server.api.chat import chat
from expertd_inference.server.api.completions import complete
from expertd_inference.server.api.errors import ApiError, answer_error
from expertd_inference.server.api.files import (
    delete_file,
    file_content,
    get_file,
    list_files,
    upload_file,
)
from expertd_inference.server.api.host import host_state
from expertd_inference.server.api.models import (
    get_model,
    health,
    list_chats,
    list_models,
    metrics,
    version,
)
from expertd_inference.server.api.responses_store import ResponseStore
from expertd_inference.server.api.unserved import UNSERVED, refuse, refuse_slots
from expertd_inference.server.front import Front
from expertd_inference.server.pages.files import page_routes
from expertstore.errors import ExpertdError

_OLLAMA = [
    Route("/api/version", ollama_models.ollama_version),
    Route("/api/tags", ollama_models.tags),
    Route("/api/ps", ollama_models.running),
    Route("/api/show", ollama_models.show, methods=["POST"]),
    Route("/api/chat", ollama.ollama_chat, methods=["POST"]),
    Route("/api/generate", ollama.ollama_generate, methods=["POST"]),
    *(
        Route(f"/api/{name}", ollama_models.manage, methods=["POST", "DELETE"])
        for name in ("embed", "embeddings", "pull", "push", "create", "copy", "delete")
    ),
]


def make_app(front: Front) -> Starlette:
    """An ASGI application that answers from ``front``."""
    routes: list[BaseRoute] = [
        Route("/health", health),
        Route("/ping", health),
        Route("/version", version),
        Route("/metrics", metrics),
        Route("/host/state", host_state),
        *page_routes(),
        *_both("/models", list_models, "GET"),
        *_both("/models/{name:path}", get_model, "GET"),
        *_both("/completions", complete, "POST"),
        *_both("/chat/completions", chat, "POST"),
        *_both("/chat/completions", list_chats, "GET"),
        *_both("/responses", responses.respond, "POST"),
        *_both("/responses/input_tokens", responses.count_input_tokens, "POST"),
        *_both("/responses/{id}", responses.get_response, "GET"),
        *_both("/responses/{id}", responses.delete_response, "DELETE"),
        *_both("/responses/{id}/input_items", responses.input_items, "GET"),
        *_both("/responses/{id}/cancel", responses.cancel_response, "POST"),
        *_both("/messages", anthropic.messages, "POST"),
        *_both("/messages/count_tokens", anthropic.count_tokens, "POST"),
        *_both("/tokenize", tokenizing.tokenize, "POST"),
        *_both("/detokenize", tokenizing.detokenize, "POST"),
        *_both("/tokenizer_info", tokenizing.tokenizer_info, "GET"),
        Route("/completion", llama.llama_complete, methods=["POST"]),
        Route("/infill", llama.infill, methods=["POST"]),
        Route("/apply-template", llama.apply_template, methods=["POST"]),
        Route("/props", llama.props),
        Route("/slots", refuse_slots),
        *_both("/chat/completions/input_tokens", llama.count_chat_tokens, "POST"),
        *(route for path in UNSERVED for route in _both(path, refuse, "POST")),
        *_OLLAMA,
        *_both("/files", upload_file, "POST"),
        *_both("/files", list_files, "GET"),
        *_both("/files/{id}", get_file, "GET"),
        *_both("/files/{id}", delete_file, "DELETE"),
        *_both("/files/{id}/content", file_content, "GET"),
        *_both("/batches", create_batch, "POST"),
        *_both("/batches", list_batches, "GET"),
        *_both("/batches/{id}", get_batch, "GET"),
        *_both("/batches/{id}/cancel", cancel_batch, "POST"),
    ]
    app = Starlette(
        routes=routes,
        exception_handlers={
            ApiError: answer_error,
            ExpertdError: answer_error,
            HTTPException: _answer_http_error,
            RecursionError: answer_error,
            Exception: answer_error,
        },
    )
    app.state.front = front
    app.state.responses = ResponseStore()
    return app


def _both(path: str, function: object, method: str) -> list[BaseRoute]:
    """With and without ``/v1``, as clients differ in what they take for the base."""
    return [Route(f"{prefix}{path}", function, methods=[method]) for prefix in ("/v1", "")]  # type: ignore[arg-type]


async def _answer_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    path = request.url.path
    if error.status_code == 404:
        message = f"There is nothing at {path}; docs/interfaces.md lists the paths."
    elif error.status_code == 405:
        message = f"{path} does not take {request.method}."
    else:
        message = str(error.detail)
    return await answer_error(request, ApiError(error.status_code, message))
