"""Batches of clients, computed by the server beside its other requests: ``/v1/batches``."""

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import msgspec

from expertd_inference.server.batches.batch_file import ENDPOINTS, BatchFile, BatchRequest
from expertd_inference.server.batches.batch_output import BatchOutput
from expertd_inference.server.batches.batch_run import Ask, Reply, run_batch
from expertd_inference.server.batches.stored_files import (
    FileObject,
    StoredFiles,
    read_struct,
    write_struct,
)
from expertstore.errors import BusyError, ExpertdError, InvalidInputError

MAX_OPEN = 64
"""Batches that are not complete."""
MAX_KEPT = 10_000
"""Batches that are described; beyond them the oldest complete ones are forgotten."""
WINDOW = "24h"
FileT = TypeVar("FileT", BatchFile, BatchOutput)
ResultT = TypeVar("ResultT")
_OVER = {"completed", "failed", "cancelled"}
_PURPOSE = "batch_output"


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


class _Kept(msgspec.Struct):
    owner: str
    batch: BatchObject


class BatchWorker:
    """Computes batches, and goes on with them after a restart.

    ``directory`` has a description of each, and the answers so far of those that are not complete.
    All together have ``at_once`` requests at a time, in turns. Everything is for one event loop.
    """

    def __init__(
        self,
        directory: Path,
        files: StoredFiles,
        door: Callable[[str], Ask],
        at_once: int,
    ) -> None:
        """``door`` gives the way in which a user's requests are asked."""
        self._directory = directory
        self._files = files
        self._door = door
        self._at_once = at_once
        self._places = asyncio.Semaphore(at_once)
        self._kept: dict[str, _Kept] = {}
        self._tasks: dict[str, asyncio.Task[None]] = {}
        directory.mkdir(parents=True, exist_ok=True)
        for path in directory.glob("*.json"):
            kept = read_struct(path, _Kept)
            self._kept[kept.batch.id] = kept
        names = {self._answers(kept.batch) for kept in self._kept.values() if not kept.batch.over}
        for path in {*directory.glob("*.jsonl"), *directory.glob("*.part")} - names:
            path.unlink()
        for kept in self._kept.values():
            if not kept.batch.over:
                self._begin(kept)

    def owned_by(self, owner: str) -> list[BatchObject]:
        """From the newest to the oldest."""
        batches = [kept.batch for kept in self._kept.values() if kept.owner == owner]
        return sorted(batches, key=lambda one: (one.created_at, one.id), reverse=True)

    def find(self, owner: str, id_: str) -> BatchObject | None:
        """None if the owner has no such batch."""
        kept = self._kept.get(id_)
        return kept.batch if kept is not None and kept.owner == owner else None

    def uses(self, file_id: str) -> bool:
        """Whether a batch that is not complete reads the file."""
        return any(
            kept.batch.input_file_id == file_id
            for kept in self._kept.values()
            if not kept.batch.over
        )

    def create(
        self, owner: str, endpoint: str, file: FileObject, metadata: Mapping[str, str] | None
    ) -> BatchObject:
        """Raises BusyError if too many are not complete, InvalidInputError for another endpoint."""
        if endpoint not in ENDPOINTS:
            raise InvalidInputError(
                f"endpoint is {endpoint!r:.80}; give one of {', '.join(ENDPOINTS)}."
            )
        if len(self._tasks) >= MAX_OPEN:
            raise BusyError(
                f"{len(self._tasks)} batches are not complete, the most that the server takes on; "
                "retry when one is."
            )
        self._forget_oldest()
        batch = BatchObject(
            id=f"batch_{secrets.token_hex(16)}",
            endpoint=endpoint,
            input_file_id=file.id,
            created_at=int(time.time()),
            request_counts=RequestCounts(),
            metadata=metadata,
        )
        kept = self._kept[batch.id] = _Kept(owner, batch)
        self._save(kept)
        self._begin(kept)
        return batch

    def cancel(self, id_: str) -> None:
        """Asks no more of it; what it has becomes its output."""
        kept = self._kept[id_]
        if kept.batch.over or kept.batch.status == "cancelling":
            return
        kept.batch.become("cancelling")
        self._save(kept)
        self._tasks[id_].cancel()
        self._begin(kept)

    async def close(self) -> None:
        """Stops, until another one goes on."""
        tasks = [*self._tasks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _begin(self, kept: _Kept) -> None:
        id_, before = kept.batch.id, self._tasks.get(kept.batch.id)
        task = self._tasks[id_] = asyncio.create_task(self._work(kept, before))

        def forget(ended: asyncio.Task[None]) -> None:
            if self._tasks.get(id_) is ended:
                del self._tasks[id_]

        task.add_done_callback(forget)

    async def _work(self, kept: _Kept, before: asyncio.Task[None] | None) -> None:
        """All of one batch, once the task ``before`` has let go of its answers."""
        if before is not None:
            await asyncio.gather(before, return_exceptions=True)
        batch = kept.batch
        end = "cancelled"
        if batch.status != "cancelling":
            end = await self._outcome(self._compute(kept), batch, "completed")
        end = await self._outcome(self._finish(kept), batch, end)
        batch.become(end)
        self._save(kept)
        self._answers(batch).unlink(missing_ok=True)

    async def _outcome(self, part: Coroutine[Any, Any, None], batch: BatchObject, end: str) -> str:
        """``end``, or failed with the reason."""
        try:
            await part
        except (ExpertdError, OSError) as error:
            batch.errors = BatchErrors([BatchError("invalid_batch", str(error))])
            return "failed"
        return end

    async def _compute(self, kept: _Kept) -> None:
        batch, door = kept.batch, self._door(kept.owner)
        counts = batch.request_counts

        async def ask(request: BatchRequest) -> Reply:
            async with self._places:
                return await door(request)

        path, endpoints = self._files.path(batch.input_file_id), (batch.endpoint,)
        with (
            await _opened(partial(BatchFile, path, "The file", endpoints)) as file,
            await _opened(partial(BatchOutput, self._answers(batch))) as output,
        ):
            counts.total = len(file)

            def count() -> None:
                counts.failed = output.num_failed
                counts.completed = len(output.answered) - counts.failed

            count()
            if batch.status == "validating":
                batch.become("in_progress")
                self._save(kept)
            await run_batch(
                file,
                output,
                ask,
                at_once=self._at_once,
                done=lambda _: count(),
                patience=math.inf,
            )
        batch.become("finalizing")
        self._save(kept)

    async def _finish(self, kept: _Kept) -> None:
        """Makes files of its answers; the same ones again, if it was ended before it was over."""
        batch = kept.batch
        if not self._answers(batch).exists():
            return
        ids = {name: f"file-{batch.id}-{name}" for name in ("output", "error")}
        paths = [self._files.path(id_) for id_ in ids.values()]
        with await _opened(partial(BatchOutput, self._answers(batch))) as output:
            await _to_its_end(asyncio.create_task(asyncio.to_thread(output.split, *paths)))
        for name, id_ in ids.items():
            path = self._files.path(id_)
            if path.stat().st_size:
                self._files.adopt(kept.owner, path, f"{batch.id}_{name}.jsonl", _PURPOSE)
                setattr(batch, f"{name}_file_id", id_)
            else:
                path.unlink()

    def _forget_oldest(self) -> None:
        over = sorted(
            (kept.batch.created_at, id_) for id_, kept in self._kept.items() if kept.batch.over
        )
        for _, id_ in over[: max(0, len(self._kept) + 1 - MAX_KEPT)]:
            del self._kept[id_]
            (self._directory / f"{id_}.json").unlink(missing_ok=True)

    def _answers(self, batch: BatchObject) -> Path:
        return self._directory / f"{batch.id}.jsonl"

    def _save(self, kept: _Kept) -> None:
        write_struct(self._directory / f"{kept.batch.id}.json", kept)


async def _opened(open_: Callable[[], FileT]) -> FileT:
    """What is opened in a thread; closed again if its task is cancelled meanwhile."""
    opening = asyncio.create_task(asyncio.to_thread(open_))
    try:
        return await _to_its_end(opening)
    except asyncio.CancelledError:
        if opening.exception() is None:
            opening.result().close()
        raise


async def _to_its_end(work: "asyncio.Task[ResultT]") -> ResultT:
    """What a thread's work returns; its end is waited for by a cancelled task as well."""
    try:
        return await asyncio.shield(work)
    except asyncio.CancelledError:
        await asyncio.wait({work})
        raise
