"""What OpenAI's interface has and models served here cannot do."""

from starlette.requests import Request
from starlette.responses import Response

from expertd_inference.server.api.errors import ApiError

UNSERVED = {
    "/embeddings": "embed texts",
    "/responses/compact": "make a conversation shorter",
    "/rerank": "rank documents",
    "/score": "score texts",
    "/classify": "classify texts",
    "/pooling": "pool texts",
    "/moderations": "moderate texts",
    "/audio/speech": "speak",
    "/audio/transcriptions": "hear",
    "/audio/translations": "hear",
    "/images/generations": "draw",
    "/images/edits": "draw",
    "/images/variations": "draw",
    "/realtime": "talk in real time",
}
"""Paths, and what the models do not do."""


async def refuse(request: Request) -> Response:
    """The route of each."""
    path = request.url.path
    what = UNSERVED[path.removeprefix("/v1").removeprefix("/v2")]
    raise ApiError(
        501,
        f"{path} is not served: the models here continue texts and chats, and do not {what}.",
        code="unsupported_endpoint",
    )


async def refuse_slots(_: Request) -> Response:
    """``GET /slots`` of llama-server: sequences have no places of their own here."""
    raise ApiError(
        501,
        "/slots is not served; /metrics says how many sequences are computed and wait.",
        code="unsupported_endpoint",
    )
