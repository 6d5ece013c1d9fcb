"""The client of expertd: what a worker links.

::

    from expertd_client import Client

    with Client() as store, store.attach("mixtral") as session:
        with session.acquire(layer=0, experts=[1, 5]) as lease:
            weights = lease.views

Imports neither torch nor numpy. :mod:`expertd_client.aio` has the same for asyncio.
"""

from expertd_client.address import TlsFiles
from expertd_client.attaching import SharedMemoryWarning
from expertd_client.base_session import PackWarning
from expertd_client.client import Client
from expertd_client.lease import Lease
from expertd_client.model import ModelInfo, ModelState, ModelSummary, MoeLayer
from expertd_client.record import Record
from expertd_client.session import Session
from expertstore.errors import (
    CapacityError,
    DeadlineError,
    ExpertdError,
    IncarnationError,
    InvalidInputError,
    NotFoundError,
    PackError,
    PermissionDeniedError,
    PreconditionError,
    RecordLostError,
    SessionLostError,
    UnauthenticatedError,
    UnavailableError,
)

__all__ = [
    "CapacityError",
    "Client",
    "DeadlineError",
    "ExpertdError",
    "IncarnationError",
    "InvalidInputError",
    "Lease",
    "ModelInfo",
    "ModelState",
    "ModelSummary",
    "MoeLayer",
    "NotFoundError",
    "PackError",
    "PackWarning",
    "PermissionDeniedError",
    "PreconditionError",
    "Record",
    "RecordLostError",
    "Session",
    "SessionLostError",
    "SharedMemoryWarning",
    "TlsFiles",
    "UnauthenticatedError",
    "UnavailableError",
]
