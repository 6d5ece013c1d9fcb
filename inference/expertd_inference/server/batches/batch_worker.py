"""Batches of clients, computed by the server beside its other requests: ``/v1/batches``."""

import asyncio
import math
import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TypeVar

import msgspec
from msgspec import structs

from expertd_inference.process.reasons import reason_of
from expertd_inference.server.batches.batch_file import ENDPOINTS, BatchFile, BatchRequest
from expertd_inference.server.batches.batch_object import (
    BatchErrors,
    BatchObject,
    RequestCounts,
    errors_of,
)
from expertd_inference.server.batches.batch_output import BatchOutput
from expertd_inference.server.batches.batch_run import Ask, Reply, run_batch
from expertd_inference.server.batches.stored_files import (
    FileObject,
    StoredFiles,
    read_struct,
    write_struct,
)
from expertstore.errors import BusyError, ExpertdError, InvalidInputError, PreconditionError

MAX_OPEN = 64
"""Batches that are not complete."""
MAX_KEPT = 10_000
"""Batches that are described; beyond them the oldest complete ones are forgotten."""
WRITE_SECONDS = 2.0
"""After which what could not be written is tried again."""
FileT = TypeVar("FileT", BatchFile, BatchOutput)
ResultT = TypeVar("ResultT")
_PURPOSE = "batch_output"


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
        """Raises BusyError if too many are not complete, InvalidInputError for another endpoint.

        And OSError if it cannot be kept.
        """
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
        kept = _Kept(owner, batch)
        self._save(kept)
        self._kept[batch.id] = kept
        self._begin(kept)
        return batch

    def cancel(self, id_: str) -> None:
        """Asks no more of one that is not over; what it has becomes its output. Raises OSError."""
        kept = self._kept[id_]
        if kept.batch.status == "cancelling":
            return
        self._become(kept, "cancelling")
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
        end = "cancelled"
        if kept.batch.status != "cancelling":
            try:
                await self._compute(kept)
                end = "completed"
            except (ExpertdError, OSError) as error:
                kept.batch.errors = errors_of(str(error))
                end = "failed"
        await self._end(kept, end)

    async def _end(self, kept: _Kept, end: str) -> None:
        """Makes its files and says that it is over, once all of that can be written."""
        errors = kept.batch.errors
        while True:
            try:
                if damage := await self._finish(kept):
                    errors, end = damage, "failed"
                kept.batch.errors = errors
                self._become(kept, end)
                break
            except (OSError, PreconditionError) as error:
                why = (
                    f"The answers cannot be written ({reason_of(error)}); they are kept, and it is "
                    "tried again until they can: make room on the server's disk."
                )
                kept.batch.errors = errors_of(why, "not_written")
                await asyncio.sleep(WRITE_SECONDS)
        self._answers(kept.batch).unlink(missing_ok=True)

    async def _compute(self, kept: _Kept) -> None:
        batch, door = kept.batch, self._door(kept.owner)
        counts = batch.request_counts  # of each description of it that follows

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
                self._become(kept, "in_progress")
            await run_batch(
                file,
                output,
                ask,
                at_once=self._at_once,
                done=lambda _: count(),
                patience=math.inf,
            )
        # The next server would find out by itself.
        kept.batch.become("finalizing")

    async def _finish(self, kept: _Kept) -> BatchErrors | None:
        """Makes files of its answers; the same ones again, if it was ended before it was over.

        Returns what is wrong with the answers.
        """
        batch = kept.batch
        if not self._answers(batch).exists():
            return None
        ids = {name: f"file-{batch.id}-{name}" for name in ("output", "error")}
        paths = [self._files.path(id_) for id_ in ids.values()]
        try:
            with await _opened(partial(BatchOutput, self._answers(batch))) as output:
                await _to_its_end(asyncio.create_task(asyncio.to_thread(output.split, *paths)))
        except InvalidInputError as error:
            return errors_of(str(error))
        for name, id_ in ids.items():
            path = self._files.path(id_)
            if path.stat().st_size:
                self._files.adopt(kept.owner, path, f"{batch.id}_{name}.jsonl", _PURPOSE)
                setattr(batch, f"{name}_file_id", id_)
            else:
                path.unlink()
        return None

    def _forget_oldest(self) -> None:
        over = sorted(
            (kept.batch.created_at, id_) for id_, kept in self._kept.items() if kept.batch.over
        )
        for _, id_ in over[: max(0, len(self._kept) + 1 - MAX_KEPT)]:
            del self._kept[id_]
            (self._directory / f"{id_}.json").unlink(missing_ok=True)

    def _answers(self, batch: BatchObject) -> Path:
        return self._directory / f"{batch.id}.jsonl"

    def _become(self, kept: _Kept, status: str) -> None:
        """Raises OSError if that cannot be written; then its status is what it was."""
        changed = _Kept(kept.owner, structs.replace(kept.batch))
        changed.batch.become(status)
        self._save(changed)
        kept.batch = changed.batch

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
