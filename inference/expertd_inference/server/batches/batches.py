"""The directory in which a server keeps its clients' files and batches."""

import asyncio
import fcntl
import os
from collections.abc import AsyncGenerator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path

from expertd_inference.server.batches.batch_run import Ask
from expertd_inference.server.batches.batch_worker import BatchWorker
from expertd_inference.server.batches.stored_files import StoredFiles
from expertstore.errors import ExpertdError, UnavailableError

MAX_UPLOADS = 4
_RETRY_SECONDS = 0.5


@dataclass
class Batches:
    """What ``/v1/files`` and ``/v1/batches`` answer from."""

    files: StoredFiles
    worker: BatchWorker
    uploads: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(MAX_UPLOADS))
    """Files that are received at a time: each lies in a temporary file until it is whole."""


class BatchRoom:
    """Holds the :class:`Batches` of a server once its directory can be had."""

    def __init__(self) -> None:
        self._batches: Batches | None = None
        self._why = "it was started without --state DIR"

    @property
    def batches(self) -> Batches:
        """Raises UnavailableError that says why there are none."""
        if self._batches is None:
            raise UnavailableError(f"This server keeps no files and batches: {self._why}.")
        return self._batches

    @asynccontextmanager
    async def kept(
        self, directory: Path, door: Callable[[str], Ask], at_once: int
    ) -> AsyncGenerator[None]:
        """Has batches in the block, from when no other server has the directory.

        :class:`.batch_worker.BatchWorker` says what ``door`` and ``at_once`` are.
        """
        opening = asyncio.create_task(self._open(directory, door, at_once))
        try:
            yield
        finally:
            opening.cancel()
            await asyncio.gather(opening, return_exceptions=True)

    async def _open(self, directory: Path, door: Callable[[str], Ask], at_once: int) -> None:
        try:
            lock = _opened_lock(directory)
        except OSError as error:
            self._why = f"{directory} cannot be used ({error.strerror})"
            return
        try:
            while not _locked(lock):
                self._why = f"another server uses {directory}"
                await asyncio.sleep(_RETRY_SECONDS)
            try:
                files = StoredFiles(directory / "files")
                worker = BatchWorker(directory / "batches", files, door, at_once)
            except (OSError, ExpertdError) as error:
                self._why = str(error).removesuffix(".")
                return
            self._batches = Batches(files, worker)
            try:
                await asyncio.get_running_loop().create_future()
            finally:
                self._batches = None
                self._why = "it is stopping"
                await worker.close()
        finally:
            os.close(lock)


def _opened_lock(directory: Path) -> int:
    directory.mkdir(mode=0o700, parents=True, exist_ok=True)
    return os.open(directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True
