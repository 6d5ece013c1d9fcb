"""Who may ask, and how much: a file of hashed keys, read again when it changes."""

import hashlib
import hmac
import secrets
import tomllib
from pathlib import Path
from typing import Annotated

import msgspec

from expertstore.errors import ConfigError, InvalidInputError

PREFIX = "ek-"
_KEY_BYTES = 32


class KeyLimits(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One user's entry in the file of keys; None is no limit.

    ``sha256`` is the key's hash, in hexadecimal. A higher ``priority`` goes before others' waiting
    requests.
    """

    sha256: str
    requests_per_minute: Annotated[float, msgspec.Meta(gt=0)] | None = None
    tokens_per_minute: Annotated[float, msgspec.Meta(gt=0)] | None = None
    max_sequences: Annotated[int, msgspec.Meta(ge=1)] | None = None
    priority: Annotated[int, msgspec.Meta(ge=-1_000_000, le=1_000_000)] = 0


class _File(msgspec.Struct, forbid_unknown_fields=True):
    keys: dict[str, KeyLimits]


class Keys:
    """The users of a file, by name; a change of the file counts from the next request on.

    A file that has become wrong changes nothing, one that is empty or gone has no keys any more;
    ``complaint`` says so.
    """

    def __init__(self, path: Path) -> None:
        """Raises ConfigError for a file that cannot be read or says something else."""
        self._path = path
        self._users: dict[str, KeyLimits] = {}
        self._stamp: tuple[int, int] | None = None
        self.complaint: str | None = None
        self._read()

    def find(self, key: str) -> tuple[str, KeyLimits] | None:
        """Whose key it is, None if nobody's."""
        self._refresh()
        hashed = digest(key)
        found = None
        # All of them, so that the time tells nothing.
        for name, limits in self._users.items():
            if hmac.compare_digest(hashed, limits.sha256):
                found = name, limits
        return found

    def limits_of(self, name: str) -> KeyLimits | None:
        """Of a user, None if there is no such one any more."""
        return self._users.get(name)

    def _refresh(self) -> None:
        try:
            if self._stamp_now() != self._stamp:
                self._read()
                self.complaint = None
        except (OSError, ConfigError) as error:
            self.complaint = f"{error} The keys that were read before still count."
            if self._is_empty():
                self._users = {}
                self._stamp = None
                self.complaint = f"{self._path} is empty or gone: nobody has a key."

    def _is_empty(self) -> bool:
        try:
            return not self._path.read_bytes().strip()
        except FileNotFoundError:
            return True
        except OSError:
            return False

    def _stamp_now(self) -> tuple[int, int]:
        found = self._path.stat()
        return found.st_mtime_ns, found.st_size

    def _read(self) -> None:
        try:
            self._stamp = self._stamp_now()
            text = self._path.read_text()
            users = msgspec.convert(tomllib.loads(text), _File).keys
        except (OSError, UnicodeDecodeError, ValueError) as error:
            raise ConfigError(
                f"The keys in {self._path} cannot be used: {error}; `expert-run key NAME` prints "
                "an entry as it must be."
            ) from error
        for name, limits in users.items():
            if len(limits.sha256) != 64 or not set(limits.sha256) <= set("0123456789abcdef"):
                raise ConfigError(
                    f"The keys in {self._path} cannot be used: sha256 of {name!r} is no SHA-256 "
                    "in small hexadecimal digits; `expert-run key NAME` prints one."
                )
        self._users = users


def new_key() -> str:
    """A key that nobody can guess."""
    return PREFIX + secrets.token_urlsafe(_KEY_BYTES)


def check_key(key: str | None) -> None:
    """Raises InvalidInputError for a key that no header of HTTP can carry."""
    if key is not None and not (key.isascii() and key.isprintable()):
        raise InvalidInputError(
            "The API key has a line's end, or a character that is not ASCII; give it as "
            "`expert-run key` printed it."
        )


def digest(key: str) -> str:
    """What the file has of a key. Keys are random, so that no slower hash is needed."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
