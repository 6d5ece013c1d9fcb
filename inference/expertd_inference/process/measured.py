"""What a host measures once and remembers, in files of the user's cache directory."""

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Generic, TypeVar

import msgspec

T = TypeVar("T")

MAX_WAIT_SECONDS = 20.0
"""For another worker that measures; one that was stopped meanwhile holds up no other for longer."""
_POLL_SECONDS = 0.02


class MeasuredOnce(Generic[T]):
    """Measured values by what they depend on, in one file that all workers of a host share.

    Whatever is wrong with the file, a value is measured anew; :meth:`say_trouble` says so.
    """

    def __init__(
        self,
        path: Path | None,
        decoder: msgspec.json.Decoder[dict[str, T]],
        what: str,
        is_sane: Callable[[T], bool],
    ) -> None:
        """``path`` is None for a user without a home. ``decoder`` reads the file.

        Values that are not sane are not believed. ``what`` ends the sentence that each start
        measures anew.
        """
        self._path = path
        self._decoder = decoder
        self._each_start = f"so each start measures anew {what}"
        self._is_sane = is_sane
        self._trouble = ""
        """What is wrong with the file, in a sentence, until it was said."""

    def values(self, keys: Iterable[str], measure: Callable[[str], T]) -> dict[str, T]:
        """The value of each key: remembered, or else measured now.

        Two workers never measure at the same time. Raises what ``measure`` does.
        """
        wanted = list(keys)
        found = self._read()
        if not set(wanted) <= found.keys():
            with _alone(self._path):
                # Another worker may have measured meanwhile.
                found = self._read()
                for key in wanted:
                    if key not in found:
                        found[key] = measure(key)
                self._write(found)
        return {key: found[key] for key in wanted}

    def say_trouble(self, say: Callable[[str], None]) -> None:
        """Tells ``say`` once if the file was damaged or cannot be kept."""
        if self._trouble:
            say(self._trouble)
            self._trouble = ""

    def _read(self) -> dict[str, T]:
        if self._path is None:
            return {}
        try:
            found = self._decoder.decode(self._path.read_bytes())
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is damaged"
            self._trouble = f"{self._path} could not be read ({why}), and is written anew."
            return {}
        return {key: value for key, value in found.items() if self._is_sane(value)}

    def _write(self, found: Mapping[str, T]) -> None:
        if self._path is None:
            self._trouble = f"There is no home directory, {self._each_start}; set XDG_CACHE_HOME."
            return
        beside = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(msgspec.json.encode(found))
            beside.replace(self._path)
        except OSError as error:
            self._trouble = (
                f"{self._path} cannot be written ({error.strerror}), {self._each_start}; make it "
                "writable, or set XDG_CACHE_HOME."
            )
            with suppress(OSError):
                beside.unlink(missing_ok=True)


def cache_file(name: str) -> Path | None:
    """``name`` in the user's cache directory for expertd; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "expertd" / name
    except RuntimeError:
        return None


@contextmanager
def _alone(path: Path | None) -> Iterator[None]:
    """While no other worker measures for the file at ``path``, where that can have a lock."""
    lock = None if path is None else _open_lock(path.with_name(f"{path.name}.lock"))
    if lock is None:
        yield
        return
    try:
        deadline = time.monotonic() + MAX_WAIT_SECONDS
        while _is_locked_by_another(lock) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(lock)


def _open_lock(path: Path) -> int | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None


def _is_locked_by_another(descriptor: int) -> bool:
    """Else it is ours now, or its file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
