"""The pages' files, as a browser gets them: from the package, and nothing from elsewhere."""

from collections.abc import Awaitable, Callable
from hashlib import sha256
from pathlib import Path

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

_TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    # A page runs no script but the package's, and talks to nobody but this server.
    "Content-Security-Policy": (
        "default-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "object-src 'none'"
    ),
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    # A browser asks each time whether its copy is still the same.
    "Cache-Control": "no-cache",
}


def _find() -> dict[str, Path]:
    found = {}
    for file in Path(__file__).parent.iterdir():
        if file.suffix == ".html":
            found["/" if file.stem == "chat" else f"/{file.stem}"] = file
        elif file.suffix in _TYPES:
            found[f"/pages/{file.name}"] = file
    return found


PAGE_FILES = _find()
"""The file at each path. They need no key: they tell nothing about anybody."""


def page_routes() -> list[BaseRoute]:
    """A route for each file."""
    return [Route(path, _answering(file)) for path, file in PAGE_FILES.items()]


def _answering(file: Path) -> Callable[[Request], Awaitable[Response]]:
    content = file.read_bytes()
    headers = {**_HEADERS, "ETag": f'"{sha256(content).hexdigest()[:16]}"'}

    async def answer(request: Request) -> Response:
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=_TYPES[file.suffix])

    return answer
