"""How a session comes to be, apart from the RPC in the middle: shared memory, or else copies."""

import errno
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from expertd_client.attachment import Attachment
from expertd_client.base_session import check_directory
from expertd_client.copy_attachment import CopyAttachment
from expertd_client.endpoint import Metadata
from expertd_client.mapping import HoldState, Mapping
from expertd_client.model import ModelInfo
from expertd_client.record_cache import RecordCache
from expertstore.shared.greeting import DescriptorsError, Greeting, handshake
from expertstore.shared.handshake import Role
from expertstore.shared.host_memory import memory_available

# What a sandbox says of mapping a descriptor, not what an operator or a caller got wrong:
# no permission, no such thing for this kind of file, no address space allowed.
_CANNOT_MAP = {errno.EPERM, errno.EACCES, errno.ENODEV, errno.ENOMEM, errno.ENOSYS}


class SharedMemoryWarning(UserWarning):
    """The daemon's memory cannot be mapped here, so records are copied."""


def greet(
    directory: Path, model: str, timeout_seconds: float, previous: Mapping | None = None
) -> Attachment | Greeting:
    """A worker's attachment, or a reader's greeting where memory cannot be shared.

    ``previous`` is what the session had mapped before: its arena is kept if it is the same.
    """
    try:
        with handshake(directory, Role.WORKER, model, timeout_seconds) as greeting:
            return Attachment(greeting, previous)
    except DescriptorsError as error:
        # A process that may open no more files can be helped; one in a sandbox cannot.
        if not _may_open_files():
            raise
        reason = str(error)
    except OSError as error:
        if error.errno not in _CANNOT_MAP:
            raise
        reason = os.strerror(error.errno)
    warnings.warn(
        f"The memory of the expertd at {directory} cannot be mapped here ({reason}): records are "
        "copied over its socket instead, into a cache of this process.",
        SharedMemoryWarning,
        stacklevel=2,
    )
    return handshake(directory, Role.READER, model, timeout_seconds)


@contextmanager
def credentials_of(greeting: Greeting) -> Iterator[Metadata]:
    """What the calls of a session carry that ends with the block."""
    with greeting:
        yield greeting.credentials


def attachment_for(
    reached: Attachment | Greeting | None,
    model: ModelInfo,
    cache_bytes: int | None,
    old: RecordCache | None,
) -> tuple[Attachment | CopyAttachment, ModelInfo]:
    """What a session lives in from now on, and the model as it then is.

    ``old`` is what the session had before: the same pack's records are good in any life. Raises
    PreconditionError, InvalidInputError if ``cache_bytes`` are too few.
    """
    if isinstance(reached, Attachment):
        check_directory(reached, model)
        return reached, model
    if old is None or old.fingerprint != model.fingerprint or old.state is not HoldState.IDLE:
        old = RecordCache(model, default_cache_bytes(model) if cache_bytes is None else cache_bytes)
    model = replace(model, max_fetch_records=old.num_slots)
    return CopyAttachment(old, model.incarnation, reached), model


def default_cache_bytes(model: ModelInfo) -> int:
    """All experts, or half of the free memory if that is less."""
    return min(model.num_experts * model.record_bytes, memory_available() // 2)


def _may_open_files() -> bool:
    try:
        os.close(os.open(os.devnull, os.O_RDONLY))
    except OSError:
        return False
    return True
