"""``/v1/batches``: files of requests, answered beside everything else."""

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from expertd_inference.server.api.errors import ApiError
from expertd_inference.server.api.files import (
    batches_of,
    json_response,
    not_kept,
    not_there,
    owner_of,
    page_of,
)
from expertd_inference.server.api.requests import read_body
from expertd_inference.server.batches.batch_object import WINDOW, BatchObject
from expertd_inference.server.front import front_of

MAX_LISTED = 100


class BatchCreation(msgspec.Struct, kw_only=True):
    """The body of a request."""

    input_file_id: str
    endpoint: str
    completion_window: str = WINDOW
    metadata: dict[str, str] | None = None


async def create_batch(request: Request) -> Response:
    """``POST /v1/batches``."""
    batches = batches_of(request)
    body = await read_body(request, BatchCreation, front_of(request).say)
    if body.completion_window != WINDOW:
        raise ApiError(
            400,
            f"completion_window is {body.completion_window!r:.80}; give {WINDOW!r}.",
            param="completion_window",
        )
    owner = owner_of(request)
    file = batches.files.find(owner, body.input_file_id)
    if file is None:
        raise not_there("file", body.input_file_id)
    try:
        return json_response(batches.worker.create(owner, body.endpoint, file, body.metadata))
    except OSError as error:
        raise not_kept("batch", error) from error


async def list_batches(request: Request) -> Response:
    """``GET /v1/batches``: the newest first."""
    found = batches_of(request).worker.owned_by(owner_of(request))
    return json_response(page_of(request, found, MAX_LISTED))


async def get_batch(request: Request) -> Response:
    """``GET /v1/batches/{id}``."""
    return json_response(_asked(request))


async def cancel_batch(request: Request) -> Response:
    """``POST /v1/batches/{id}/cancel``."""
    batch = _asked(request)
    if batch.over:
        raise ApiError(409, f"{batch.id} is {batch.status} already.", code="batch_is_over")
    try:
        batches_of(request).worker.cancel(batch.id)
    except OSError as error:
        raise not_kept("batch", error) from error
    return json_response(_asked(request))


def _asked(request: Request) -> BatchObject:
    id_ = request.path_params["id"]
    batch = batches_of(request).worker.find(owner_of(request), id_)
    if batch is None:
        raise not_there("batch", id_)
    return batch
