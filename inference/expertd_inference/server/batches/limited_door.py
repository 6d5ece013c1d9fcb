"""How a server asks itself for a user: within the user's limits."""

import asyncio
import time

from starlette.types import ASGIApp

from expertd_inference.server.accounts import Accounts
from expertd_inference.server.batches.app_door import AppDoor
from expertd_inference.server.batches.batch_file import BatchRequest
from expertd_inference.server.batches.batch_run import Reply
from expertd_inference.server.keys import Keys
from expertstore.errors import PreconditionError


class LimitedDoor:
    """Asks the application for ``user``, no more often than the user may ask."""

    def __init__(self, app: ASGIApp, accounts: Accounts, keys: Keys | None, user: str) -> None:
        self._ask = AppDoor(app, user)
        self._accounts = accounts
        self._keys = keys
        self._user = user

    async def __call__(self, request: BatchRequest) -> Reply:
        """Of :data:`.batch_run.Ask`. Raises PreconditionError if the user's key is gone."""
        while self._keys is not None and self._user:
            limits = self._keys.limits_of(self._user)
            if limits is None:
                raise PreconditionError(f"{self._user} has no key any more.")
            wait = self._accounts.seconds_until_request(self._user, limits, time.monotonic())
            if not wait:
                break
            await asyncio.sleep(wait)
        return await self._ask(request)


def at_once_beside_others(max_sequences: int) -> int:
    """How many sequences batches may have, so that others find a place without waiting."""
    return max(1, max_sequences * 3 // 4)
