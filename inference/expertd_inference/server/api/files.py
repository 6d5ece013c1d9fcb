"""``/v1/files``: files that batches read and write."""

import asyncio
import shutil
from collections.abc import Awaitable, Callable, MutableMapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import msgspec
from starlette.datastructures import UploadFile
from starlette.requests import ClientDisconnect, Request
from starlette.responses import FileResponse, Response

from expertd_inference.server.api.errors import ApiError, unsupported
from expertd_inference.server.batches.batches import Batches
from expertd_inference.server.batches.stored_files import FileObject
from expertd_inference.server.front import front_of
from expertstore.errors import UnavailableError

MAX_UPLOAD_BYTES = 200 << 20
"""OpenAI's limit for a batch."""
MAX_LISTED = 10_000
UPLOAD_SECONDS = 300.0
_MAX_FIELDS = 8
_MAX_DIGITS = 20
PURPOSE = "batch"
_FORM = "multipart/form-data"


async def upload_file(request: Request) -> Response:
    """``POST /v1/files``."""
    batches = batches_of(request)
    files = batches.files
    bounded = Request(request.scope, _bounded(request.receive))
    if not request.headers.get("content-type", "").startswith(_FORM):
        raise ApiError(400, f"The body is no {_FORM}; send file and purpose so.")
    try:
        async with (
            asyncio.timeout(UPLOAD_SECONDS),
            batches.uploads,
            bounded.form(max_files=1, max_fields=_MAX_FIELDS) as form,
        ):
            file, purpose = form.get("file"), form.get("purpose")
            if not isinstance(file, UploadFile):
                raise ApiError(400, "file is missing; send it as a file.", param="file")
            if purpose != PURPOSE:
                raise unsupported("purpose", f"is {purpose!r:.80}, and may only be {PURPOSE!r}.")
            files.check_room(file.size or 0)
            path = files.new_path()
            await asyncio.to_thread(_write, path, file.file)
            name = Path(file.filename or path.name).name
            return json_response(files.adopt(owner_of(request), path, name, PURPOSE))
    except TimeoutError as late:
        raise ApiError(
            408, f"The file was not there after {UPLOAD_SECONDS:g} s.", code="timeout"
        ) from late
    except ClientDisconnect as gone:
        raise ApiError(400, "The client left before its file was complete.") from gone
    except OSError as error:
        raise not_kept("file", error) from error


async def list_files(request: Request) -> Response:
    """``GET /v1/files``."""
    found = batches_of(request).files.owned_by(owner_of(request))
    if (purpose := request.query_params.get("purpose")) is not None:
        found = [file for file in found if file.purpose == purpose]
    if request.query_params.get("order") != "asc":
        found.reverse()
    return json_response(page_of(request, found, MAX_LISTED))


async def get_file(request: Request) -> Response:
    """``GET /v1/files/{id}``."""
    return json_response(_asked(request))


async def file_content(request: Request) -> Response:
    """``GET /v1/files/{id}/content``."""
    path = batches_of(request).files.path(_asked(request).id)
    return FileResponse(path, media_type="application/jsonl")


async def delete_file(request: Request) -> Response:
    """``DELETE /v1/files/{id}``."""
    file, batches = _asked(request), batches_of(request)
    if batches.worker.uses(file.id):
        raise ApiError(
            409, f"A batch reads {file.id}; cancel the batch, or wait for its end.", code="in_use"
        )
    batches.files.delete(file.id)
    return json_response({"id": file.id, "object": "file", "deleted": True})


def batches_of(request: Request) -> Batches:
    """The server's. Raises ApiError 501 if it keeps none."""
    try:
        return front_of(request).room.batches
    except UnavailableError as error:
        raise ApiError(501, str(error), kind="server_error", code="not_implemented") from error


def owner_of(request: Request) -> str:
    """Whose files and batches a request sees: those of its key, or without keys all."""
    return getattr(request.state, "user", None) or ""


def page_of(request: Request, found: Sequence[Any], most: int) -> dict[str, Any]:
    """OpenAI's list: ``limit`` of those that come after the one named. Raises ApiError."""
    limit, after = request.query_params.get("limit", str(most)), request.query_params.get("after")
    # Python reads no number of thousands of digits.
    if not limit.isdecimal() or len(limit) > _MAX_DIGITS or not 1 <= int(limit) <= most:
        raise ApiError(400, f"limit is {limit!r:.80}; give 1 to {most}.", param="limit")
    ids = [one.id for one in found]
    if after is not None:
        if after not in ids:
            raise ApiError(400, f"after is {after!r:.80}; give an id of this list.", param="after")
        found = found[ids.index(after) + 1 :]
    data = found[: int(limit)]
    return {
        "object": "list",
        "data": data,
        "first_id": data[0].id if data else None,
        "last_id": data[-1].id if data else None,
        "has_more": len(data) < len(found),
    }


def json_response(value: Any) -> Response:  # noqa: ANN401 - what msgspec encodes
    """200 with ``value`` as JSON."""
    return Response(msgspec.json.encode(value), media_type="application/json")


def not_kept(what: str, error: OSError) -> ApiError:
    """The error for what the server's disk does not take."""
    return ApiError(
        507, f"The {what} cannot be kept: {error.strerror}.", kind="server_error", code="no_space"
    )


def not_there(what: str, id_: str) -> ApiError:
    """404."""
    listed = "files" if what == "file" else "batches"
    message = f"There is no {what} {id_!r:.80}; GET /v1/{listed} has those that there are."
    return ApiError(404, message, code="not_found", param="id")


def _asked(request: Request) -> FileObject:
    id_ = request.path_params["id"]
    file = batches_of(request).files.find(owner_of(request), id_)
    if file is None:
        raise not_there("file", id_)
    return file


def _write(path: Path, content: BinaryIO) -> None:
    try:
        with path.open("wb") as file:
            shutil.copyfileobj(content, file)
    except BaseException:
        path.unlink(missing_ok=True)
        raise


def _bounded(
    receive: Callable[[], Awaitable[MutableMapping[str, Any]]],
) -> Callable[[], Awaitable[MutableMapping[str, Any]]]:
    """``receive`` that raises ApiError once there is more than an upload may have."""
    num_bytes = 0

    async def bounded() -> MutableMapping[str, Any]:
        nonlocal num_bytes
        message = await receive()
        num_bytes += len(message.get("body", b""))
        if num_bytes > MAX_UPLOAD_BYTES:
            raise ApiError(413, f"The file has more than {MAX_UPLOAD_BYTES} bytes; give less.")
        return message

    return bounded
