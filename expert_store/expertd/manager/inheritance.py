"""What the daemon before us left in the service manager's fd store, and what we leave there.

The store holds the arena under ``arena`` and the directory of each model under
``directory-N``; that is all there is. Nothing in it is believed before it has been checked:
whatever fails is taken out of the store and told in one line of the log.
"""

import asyncio
import itertools
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from expertd.log import log_warning
from expertd.manager.systemd import Manager, Passed
from expertd.memory.arena import arena_bytes, discard_contents, trailer_words
from expertd.memory.description import Description, Origin, read_description
from expertd.memory.memfd import SharedMemory
from expertstore.pack.manifest import Fingerprinted
from expertstore.shared.arena_trailer import TRAILER_BYTES, ArenaTrailer
from expertstore.shared.directory import DirectoryView
from expertstore.sizes import format_bytes

ARENA_NAME = "arena"
DIRECTORY_PREFIX = "directory-"


class InheritedModel(NamedTuple):
    """A directory that is whole, though its words are yet to be checked."""

    stored_as: str
    memory: SharedMemory
    description: Description

    @property
    def num_entries(self) -> int:
        """As its header has it."""
        return DirectoryView(self.memory.view.cast("Q")).num_entries


class FdStore:
    """The descriptors that the next daemon is to get. Without a manager it does nothing."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager
        self._names: set[str] = set()

    def __repr__(self) -> str:
        return f"FdStore({sorted(self._names)})"

    @property
    def is_full(self) -> bool:
        """Whether the manager is known to have room for none more."""
        most = self._manager.max_stored
        return self._manager.is_there and most is not None and len(self._names) >= most

    def note(self, name: str) -> None:
        """Takes note that the store holds that name already."""
        self._names.add(name)

    async def put_arena(self, memory: SharedMemory) -> None:
        """Stores the arena in place of any other."""
        await self._put(ARENA_NAME, memory)

    async def put_directory(self, memory: SharedMemory) -> str:
        """Stores a complete directory; under which name. Returns once it is there."""
        numbers = map(f"{DIRECTORY_PREFIX}{{}}".format, itertools.count())
        name = next(name for name in numbers if name not in self._names)
        await self._put(name, memory)
        return name

    async def remove(self, name: str) -> None:
        """Takes out what is stored under the name. Returns once it is gone."""
        self._names.discard(name)
        await self._manager.remove(name)
        await self._manager.barrier()

    async def _put(self, name: str, memory: SharedMemory) -> None:
        self._names.add(name)
        await self._manager.store(name, memory.fd)
        await self._manager.barrier()


class Inheritance:
    """``arena``: memory to go on with, None if there is none that fits. Models by name."""

    def __init__(self, arena: SharedMemory | None, models: dict[str, InheritedModel]) -> None:
        self.arena = arena
        self.models = models

    def __repr__(self) -> str:
        return f"Inheritance({self.arena}, {sorted(self.models)})"

    async def claim(
        self, store: FdStore, name: str, path: Path, pack: Fingerprinted
    ) -> InheritedModel | None:
        """What was left of that model, if it is of the very same pack; given up if it is not."""
        found = self.models.get(name)
        if found is None:
            return None
        if found.description.pack != str(path):
            await self.give_up(store, name, f"it was of another pack, {found.description.pack}")
        elif found.description.fingerprint != pack.fingerprint:
            await self.give_up(store, name, f"the pack in {path} is not what it was")
        elif found.num_entries != pack.manifest.num_experts:
            await self.give_up(store, name, "its directory's header is damaged")
        else:
            return self.models.pop(name)
        return None

    async def give_up(self, store: FdStore, name: str, cause: object) -> None:
        """Drops what was left of a model; its room is free."""
        found = self.models.pop(name)
        log_warning("model not adopted", model=name, cause=cause)
        await store.remove(found.stored_as)
        found.memory.close()

    def of_admins(self) -> list[Description]:
        """The models not claimed yet that were loaded at run time."""
        left = [each.description for each in self.models.values()]
        return [each for each in left if each.origin is Origin.ADMIN]


async def take_inheritance(manager: Manager, store: FdStore, ram_bytes: int) -> Inheritance:
    """What the manager passed, as far as it is whole and fits; all else is given up."""
    arenas: list[Passed] = []
    directories: list[Passed] = []
    for passed in manager.take_rest():
        if passed.name == ARENA_NAME:
            arenas.append(passed)
        elif passed.name.startswith(DIRECTORY_PREFIX):
            directories.append(passed)
        else:
            log_warning("passed descriptor is unknown", name=passed.name)
            os.close(passed.fd)
            await store.remove(passed.name)
    arena = await _take_arena(store, arenas, ram_bytes)
    models: dict[str, InheritedModel] = {}
    for passed in directories:
        store.note(passed.name)
    for passed in directories:
        try:
            found = _open_directory(passed, arena, models)
        except ValueError as error:
            log_warning("directory not adopted", name=passed.name, cause=str(error))
            await store.remove(passed.name)
        else:
            models[found.description.name] = found
    return Inheritance(arena, models)


async def _take_arena(
    store: FdStore, passed: Iterable[Passed], ram_bytes: int
) -> SharedMemory | None:
    wanted = arena_bytes(ram_bytes)
    kept: SharedMemory | None = None
    given_up = False
    for each in passed:
        try:
            memory = SharedMemory.adopt(each.fd)
        except ValueError as error:
            log_warning("arena not adopted", cause=str(error))
            os.close(each.fd)
            given_up = True
            continue
        problem = _problem_of(memory, wanted)
        if problem is None and kept is None:
            kept = memory
            continue
        log_warning("arena not adopted", cause=problem or "there are two, and one is enough")
        await asyncio.to_thread(_discard, memory)
        given_up = True
    if given_up:
        await store.remove(ARENA_NAME)  # all of that name
        if kept is not None:
            await store.put_arena(kept)
    elif kept is not None:
        store.note(ARENA_NAME)
    return kept


def _problem_of(memory: SharedMemory, wanted: int) -> str | None:
    try:
        ArenaTrailer(trailer_words(memory))
    except ValueError as error:
        return str(error)
    size = memory.num_bytes - TRAILER_BYTES
    if size != wanted:
        return (
            f"it has {format_bytes(size)} and the budget is now {format_bytes(wanted)}: the "
            "records are read again"
        )
    return None


def _discard(memory: SharedMemory) -> None:
    with suppress(ValueError):  # it has no trailer that workers would heed: they may read on
        discard_contents(memory)
    memory.close()


def _open_directory(
    passed: Passed, arena: SharedMemory | None, models: dict[str, InheritedModel]
) -> InheritedModel:
    """Takes over the descriptor. Raises ValueError, with the reason, if it cannot be adopted."""
    try:
        memory = SharedMemory.adopt(passed.fd)
    except ValueError:
        os.close(passed.fd)
        raise
    try:
        if arena is None:
            raise ValueError("the arena that it is of was not adopted")
        description = read_description(memory)
        if description.arena != ArenaTrailer(trailer_words(arena)).id:
            raise ValueError("it is of another arena")
        if description.name in models:
            raise ValueError(f"there are two of {description.name!r}, and one is enough")
    except ValueError:
        memory.close()
        raise
    return InheritedModel(passed.name, memory, description)
