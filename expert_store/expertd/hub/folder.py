"""A checkpoint of a hub as a directory: its shards are fetched one by one, and dropped again.

::

    FOLDER/COMMIT/checkpoint/    config, tokenizer, index; of each shard a link if it is here, or
                                 else a stub: its header, and a hole as long as the rest
    FOLDER/COMMIT/fetched/       shards as they were fetched, and what the library notes of them

So whatever reads names, shapes and sizes reads this directory like any other checkpoint. Bytes of
tensors are another matter: ask :meth:`HubFolder.is_here`, and :meth:`HubFolder.read` if not.
"""

import errno
import json
import os
import shutil
import struct
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from fnmatch import fnmatch
from pathlib import Path
from threading import Condition, Thread
from types import TracebackType
from typing import Self

from expertd.hub.repository import HubFile, Repository
from expertd.packing.checkpoint_files import CONFIG_NAME, EXPLICIT_KEY, INDEX_NAME, SINGLE_NAME
from expertstore.errors import CheckpointError

NUM_READERS = 8
"""Headers read at a time."""
NUM_AHEAD = 2
"""Shards fetched beyond the last one that was waited for."""
MAX_SIDE_BYTES = 256 << 20
"""Of a file that is no shard: nothing that a tokenizer needs is larger."""
_HEADER_BYTES = 256 << 10
"""Read of a shard at first: most headers are shorter."""
_MAX_HEADER_BYTES = 100 << 20
"""The limit of safetensors."""


class HubFolder:
    """See the module. Close it, or use it as a context manager; threads may share it."""

    def __init__(
        self,
        repository: Repository,
        folder: Path,
        *,
        keep: bool = False,
        on_bytes: Callable[[int], None] = lambda _: None,
    ) -> None:
        """``on_bytes`` gets the bytes of shards that came, from a thread.

        ``keep``: shards go into the hub's cache on this host, and stay there.
        """
        self.repository = repository
        self._folder = folder
        self.path = folder / repository.commit / "checkpoint"
        self.shards: dict[str, HubFile] = {}
        """By name, in the index's order of names; known after :meth:`prepare`."""
        self._fetched = folder / repository.commit / "fetched"
        self._keep = keep
        self._on_bytes = on_bytes
        self.wanted_bytes = 0
        """Of the shards that are to be fetched; known after :meth:`fetch`."""
        self._order: list[Path] = []
        self._horizon = 0
        self._error: BaseException | None = None
        self._closed = False
        self._changed = Condition()
        self._thread: Thread | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def fingerprint(self) -> str:
        """The same for the same bytes."""
        return f"{self.repository.reference.name} {self.repository.commit}"

    def prepare(
        self, side_files: Sequence[str], on_file: Callable[[int, int], None] = lambda *_: None
    ) -> None:
        """Fetches what is small, and the headers of the shards. Raises :class:`CheckpointError`.

        ``side_files`` are patterns of names. What is there already is left as it is. ``on_file``
        gets how many shards were looked at, of how many.
        """
        if self._folder.is_dir():
            for other in self._folder.iterdir():
                if other.name != self.repository.commit:
                    shutil.rmtree(other)
        self.path.mkdir(parents=True, exist_ok=True)
        names = self.repository.files
        if CONFIG_NAME not in names:
            raise CheckpointError(
                f"{self.repository.reference} is no model in Hugging Face's form: it has no "
                f"{CONFIG_NAME}{_has_instead(names)}."
            )
        wanted = {CONFIG_NAME, INDEX_NAME, *_matching(names, side_files)} & names.keys()
        for name in sorted(wanted):
            self._bring_side_file(self.repository.files[name])
        self.shards = {name: self.repository.files[name] for name in self._shard_names()}
        with ThreadPoolExecutor(NUM_READERS) as pool:
            made = pool.map(self._make_stub, self.shards.values())
            for count, _ in enumerate(made):
                on_file(1 + count, len(self.shards))

    @property
    def most_bytes(self) -> int:
        """The most that shards take on the folder's disk at a time.

        An expert may lie in two of them, and some are fetched ahead.
        """
        if self._keep:
            return 0
        largest = sorted((shard.num_bytes for shard in self.shards.values()), reverse=True)
        return sum(largest[: 2 + NUM_AHEAD])

    def is_here(self, file: Path) -> bool:
        """Whether the shard's bytes can be read from ``file``."""
        return file.is_symlink()

    def read(self, file: Path, offset: int, count: int) -> bytes:
        """Bytes of a shard that is not here, from the hub. Raises :class:`CheckpointError`."""
        return self.repository.read(str(file.relative_to(self.path)), offset, count)

    def fetch(self, files: Iterable[Path]) -> None:
        """Begins to fetch them in this order, as :meth:`wait` asks for them."""
        self._order = [file for file in files if not self.is_here(file)]
        names = [str(file.relative_to(self.path)) for file in self._order]
        self.wanted_bytes = sum(self.shards[name].num_bytes for name in names)
        if self._order:
            self._thread = Thread(target=self._fetch_all, name="expertd-fetcher", daemon=True)
            self._thread.start()

    def wait(self, file: Path) -> None:
        """Returns once the shard is here. Raises what fetching it raised."""
        if self.is_here(file):
            return
        with self._changed:
            self._horizon = max(self._horizon, self._order.index(file) + NUM_AHEAD)
            self._changed.notify_all()
            self._changed.wait_for(lambda: self.is_here(file) or self._error or self._closed)
            if self.is_here(file):
                return
            if self._error is not None:
                raise self._error
            raise RuntimeError("closed while waited for")

    def drop(self, file: Path) -> None:
        """Forgets the bytes of a shard that nobody needs any more, unless a cache has them."""
        target = file.readlink() if self.is_here(file) else None
        if target is None or not target.is_relative_to(self._fetched.absolute()):
            return
        stub = file.with_name(f".{file.name}.stub")
        _write_stub(stub, self._header_of(file), file.stat().st_size)
        stub.replace(file)
        target.unlink()

    def close(self) -> None:
        """Ends fetching; what came of a shard stays for another time. Twice is harmless."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _fetch_all(self) -> None:
        try:
            for index, file in enumerate(self._order):
                with self._changed:
                    self._changed.wait_for(lambda: index <= self._horizon or self._closed)  # noqa: B023 - waited for here
                    if self._closed:
                        return
                self._bring_shard(self.shards[str(file.relative_to(self.path))])
        except _ClosedError:
            pass
        except BaseException as error:
            with self._changed:
                self._error = error
        with self._changed:
            self._changed.notify_all()

    def _bring_shard(self, shard: HubFile) -> None:
        came = 0

        def count(num_bytes: int) -> None:
            nonlocal came
            if self._closed:
                raise _ClosedError
            came += num_bytes
            self._on_bytes(num_bytes)

        place = None if self._keep else self._fetched
        file = self.repository.download(shard.name, place, count)
        self._on_bytes(shard.num_bytes - came)
        self._link(self.path / shard.name, file)

    def _link(self, place: Path, file: Path) -> None:
        link = place.with_name(f".{place.name}.link")
        link.unlink(missing_ok=True)
        link.symlink_to(file.absolute())
        with self._changed:
            link.replace(place)
            self._changed.notify_all()

    def _bring_side_file(self, file: HubFile) -> None:
        place = self.path / file.name
        if file.num_bytes > MAX_SIDE_BYTES:
            raise CheckpointError(
                f"{file.name} of {self.repository.reference} has {file.num_bytes} bytes, more than "
                f"any configuration or tokenizer ({MAX_SIDE_BYTES}); look at the repository."
            )
        if not place.exists():
            place.parent.mkdir(parents=True, exist_ok=True)
            came = self.repository.cached(file.name) or self.repository.download(
                file.name, self._fetched, lambda _: None
            )
            self._link(place, came)

    def _shard_names(self) -> list[str]:
        """Those that transformers would load."""
        names = self.repository.files
        config = json.loads((self.path / CONFIG_NAME).read_bytes())
        main = config.get(EXPLICIT_KEY) if isinstance(config, dict) else None
        if main is None:
            main = next((name for name in (SINGLE_NAME, INDEX_NAME) if name in names), None)
        if main is None or main not in names:
            raise CheckpointError(
                f"{self.repository.reference} has no weights in safetensors{_has_instead(names)}."
            )
        if not main.endswith(".index.json"):
            return [main]
        if main != INDEX_NAME:
            self._bring_side_file(names[main])
        try:
            shards = sorted(set(json.loads((self.path / main).read_bytes())["weight_map"].values()))
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{main} of {self.repository.reference} names no shards; give another revision."
            ) from error
        for name in shards:
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise CheckpointError(
                    f"{main} of {self.repository.reference} names {name}, which lies outside of "
                    "the repository; give another revision, or ask its owner."
                )
            if name not in names:
                raise CheckpointError(
                    f"{self.repository.reference} lacks {name}, which its {main} names; its upload "
                    "is not complete: give another revision, or ask its owner."
                )
        return shards

    def _make_stub(self, shard: HubFile) -> None:
        place = self.path / shard.name
        if place.is_symlink() and not place.exists():
            place.unlink()  # of a cache that was cleaned
        if place.exists():
            return
        place.parent.mkdir(parents=True, exist_ok=True)
        if cached := self.repository.cached(shard.name):
            self._link(place, cached)
            return
        start = self.repository.read(shard.name, 0, min(_HEADER_BYTES, shard.num_bytes))
        (length,) = struct.unpack("<Q", start[:8].ljust(8, b"\0"))
        if 8 + length > shard.num_bytes or length > _MAX_HEADER_BYTES:
            raise CheckpointError(
                f"{shard.name} of {self.repository.reference} is no safetensors file; give another "
                "revision, or ask its owner."
            )
        if len(start) < 8 + length:
            start += self.repository.read(shard.name, len(start), 8 + length - len(start))
        stub = place.with_name(f".{place.name}.stub")
        _write_stub(stub, start[: 8 + length], shard.num_bytes)
        stub.replace(place)

    def _header_of(self, file: Path) -> bytes:
        with file.open("rb") as opened:
            length = opened.read(8)
            return length + opened.read(struct.unpack("<Q", length)[0])


class _ClosedError(Exception):
    """Ends a transfer whose folder was closed."""


def _matching(names: Iterable[str], patterns: Sequence[str]) -> set[str]:
    """As a glob in a directory: ``*`` is not for what lies in a folder below."""
    return {
        name
        for name in names
        for pattern in patterns
        if fnmatch(name, pattern) and name.count("/") == pattern.count("/")
    }


def _write_stub(place: Path, header: bytes, num_bytes: int) -> None:
    with place.open("wb") as out:
        out.write(header)
        try:
            out.truncate(num_bytes)
        except OSError as error:
            if error.errno == errno.EFBIG:
                raise CheckpointError(
                    f"The disk of {place.parent} takes no file of {num_bytes} bytes; choose "
                    "another place for the pack."
                ) from error
            raise
        os.fsync(out.fileno())


def _has_instead(names: Iterable[str]) -> str:
    """``, but GGUF``: what a repository without weights that can be packed is likely to be."""
    kinds = {
        "GGUF": ".gguf",
        "an adapter (LoRA)": "adapter_config.json",
        "PyTorch's own files": ".bin",
        "its maker's own files": "consolidated.safetensors",
    }
    found = [kind for kind, end in kinds.items() if any(name.endswith(end) for name in names)]
    return f", but {found[0]}" if found else ""
