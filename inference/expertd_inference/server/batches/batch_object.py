"""A batch as OpenAI describes it."""

import time
from collections.abc import Mapping

import msgspec

WINDOW = "24h"
_OVER = {"completed", "failed", "cancelled"}


class RequestCounts(msgspec.Struct):
    """Of a batch's lines."""

    total: int = 0
    completed: int = 0
    failed: int = 0


class BatchError(msgspec.Struct):
    """Why a batch failed as a whole."""

    code: str
    message: str
    line: int | None = None
    param: str | None = None


class BatchErrors(msgspec.Struct):
    """OpenAI's list of them."""

    data: list[BatchError]
    object: str = "list"


class BatchObject(msgspec.Struct, kw_only=True):
    """A batch as OpenAI describes it; no batch expires here."""

    id: str
    object: str = "batch"
    endpoint: str
    errors: BatchErrors | None = None
    input_file_id: str
    completion_window: str = WINDOW
    status: str = "validating"
    output_file_id: str | None = None
    error_file_id: str | None = None
    created_at: int
    in_progress_at: int | None = None
    expires_at: int | None = None
    finalizing_at: int | None = None
    completed_at: int | None = None
    failed_at: int | None = None
    expired_at: int | None = None
    cancelling_at: int | None = None
    cancelled_at: int | None = None
    request_counts: RequestCounts
    metadata: Mapping[str, str] | None = None

    @property
    def over(self) -> bool:
        """Whether nothing more becomes of it."""
        return self.status in _OVER

    def become(self, status: str) -> None:
        """Changes its status, and notes when."""
        self.status = status
        setattr(self, f"{status}_at", int(time.time()))


def errors_of(message: str, code: str = "invalid_batch") -> BatchErrors:
    """One error, of the whole batch."""
    return BatchErrors([BatchError(code, message)])
