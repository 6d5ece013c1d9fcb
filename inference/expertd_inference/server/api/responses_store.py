"""Responses that are kept, so that later ones go on after them."""

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import msgspec

MAX_RESPONSES = 1024
MAX_BYTES = 64 << 20


@dataclass(frozen=True)
class Stored:
    """A response as JSON, its input's items, and its chat's messages without instructions."""

    response: bytes
    messages: bytes
    items: bytes = b""

    @property
    def num_bytes(self) -> int:
        """What it takes."""
        return len(self.response) + len(self.messages) + len(self.items)

    @property
    def chat(self) -> list[dict[str, Any]]:
        """The messages."""
        return msgspec.json.decode(self.messages, type=list[dict[str, Any]])


class ResponseStore:
    """The responses used last, in memory; a user has their own, and finds no one else's."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses = max_responses
        self._max_bytes = max_bytes
        self._stored: OrderedDict[tuple[str, str], Stored] = OrderedDict()
        self._num_bytes = 0

    def put(self, user: str, id_: str, stored: Stored) -> None:
        """Keeps one, and drops those that were not used for longest if there is no room."""
        self._stored[user, id_] = stored
        self._num_bytes += stored.num_bytes
        while len(self._stored) > self._max_responses or self._num_bytes > self._max_bytes:
            _, dropped = self._stored.popitem(last=False)
            self._num_bytes -= dropped.num_bytes

    def get(self, user: str, id_: str) -> Stored | None:
        """One that is kept."""
        if (stored := self._stored.get((user, id_))) is not None:
            self._stored.move_to_end((user, id_))
        return stored

    def delete(self, user: str, id_: str) -> bool:
        """Whether there was such a one."""
        stored = self._stored.pop((user, id_), None)
        if stored is not None:
            self._num_bytes -= stored.num_bytes
        return stored is not None
