"""What each user has had lately, against its limits; pure: the caller says what time it is."""

from dataclasses import dataclass

from expertd_inference.server.keys import KeyLimits
from expertstore.errors import BusyError

MINUTE = 60.0


@dataclass
class Bucket:
    """A token bucket: it holds ``per_minute`` and fills in a minute; it may go below zero."""

    per_minute: float
    level: float
    seen: float

    def seconds_until(self, amount: float, now: float) -> float:
        """How long until it has ``amount``; 0 if it has."""
        self._fill(now)
        lacks = min(amount, self.per_minute) - self.level
        return max(0.0, lacks / self.per_minute * MINUTE)

    def take(self, amount: float, now: float) -> None:
        """Takes ``amount``, whether it is there or not: what was used is used."""
        self._fill(now)
        self.level -= amount

    def _fill(self, now: float) -> None:
        self.level = min(self.per_minute, self.level + (now - self.seen) / MINUTE * self.per_minute)
        self.seen = now


class Accounts:
    """Buckets of users with limits, and how many sequences each has."""

    def __init__(self) -> None:
        self._limits: dict[str, KeyLimits] = {}
        self._requests: dict[str, Bucket] = {}
        self._tokens: dict[str, Bucket] = {}
        self._sequences: dict[str, int] = {}

    def seconds_until_request(self, user: str, limits: KeyLimits, now: float) -> float:
        """How long the user must wait before another request; 0 takes one of its requests.

        Tokens of answers are taken after they came, so that a user may be in debt.
        """
        self._limits[user] = limits
        requests = _bucket(self._requests, user, limits.requests_per_minute, now)
        tokens = _bucket(self._tokens, user, limits.tokens_per_minute, now)
        wait = max(
            0.0 if requests is None else requests.seconds_until(1, now),
            0.0 if tokens is None else tokens.seconds_until(1, now),
        )
        if not wait and requests is not None:
            requests.take(1, now)
        return wait

    def take_tokens(self, user: str, num_tokens: int, now: float) -> None:
        """Of prompts and answers; nothing for a user without such a limit."""
        if (bucket := self._tokens.get(user)) is not None:
            bucket.take(num_tokens, now)

    def priority_of(self, user: str, wished: int) -> int:
        """Of a sequence for which a request wishes a priority: a user may only lower its own."""
        limits = self._limits.get(user)
        return wished if limits is None else limits.priority + min(0, wished)

    def begin(self, user: str) -> None:
        """The user has a sequence more. Pairs with :meth:`end`.

        Raises BusyError if it has as many as it may.
        """
        has = self._sequences.get(user, 0)
        limits = self._limits.get(user)
        if limits is not None and limits.max_sequences is not None and has >= limits.max_sequences:
            raise BusyError(
                f"{user} has {has} sequences running and waiting, the most that it may "
                "(max_sequences); retry when one has ended."
            )
        self._sequences[user] = has + 1

    def end(self, user: str) -> None:
        """One of the user's sequences has ended."""
        self._sequences[user] -= 1
        if not self._sequences[user]:  # without keys each host is a user
            del self._sequences[user]


def _bucket(
    buckets: dict[str, Bucket], user: str, per_minute: float | None, now: float
) -> Bucket | None:
    """The user's, made anew if its limit has changed; None without a limit."""
    if per_minute is None:
        buckets.pop(user, None)
        return None
    bucket = buckets.get(user)
    if bucket is None or bucket.per_minute != per_minute:
        buckets[user] = bucket = Bucket(per_minute, per_minute, now)
    return bucket
