"""Opening a pack's files for reading, in the way that is asked for or is faster."""

import os
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path

from expertd.disk.mapped_file import MappedFile
from expertd.disk.page_cache import PageCache
from expertd.disk.record_file import RecordFile
from expertd.disk.trial import NOT_TRIED, Trial, TrialRead, choose_reads, faster, try_both
from expertd.log import log_warning
from expertd.settings.disk_io import DiskIo
from expertstore.errors import PackError
from expertstore.pack.manifest import Manifest, PackFile
from expertstore.sizes import format_bytes


@dataclass(frozen=True)
class DiskChoice:
    """How a pack's records are read, and why."""

    asked: DiskIo = DiskIo.DIRECT
    way: DiskIo = DiskIo.DIRECT
    """``DIRECT`` or ``MMAP``."""
    past_page_cache: bool = True
    """Whether reads leave nothing in the page cache."""
    trial: Trial = NOT_TRIED
    trouble: str = ""
    """Why it cannot be mapped, where that was tried and not asked for."""

    def __str__(self) -> str:
        """For the start line: the way, and in a trial's case what both gave."""
        way = "by mmap" if self.way is DiskIo.MMAP else "direct"
        if self.way is DiskIo.DIRECT and not self.past_page_cache:
            way = "through the page cache"
        if self.trial.is_known:
            direct, mapped = (_rate(each) for each in (self.trial.direct, self.trial.mapped))
            return f"read {way} (tried: direct {direct}, mmap {mapped})"
        return f"read {way}"


DEFAULT_DISK = DiskChoice()


@dataclass(frozen=True)
class OpenPack:
    """The files of a pack, in the manifest's order, and how they are read."""

    files: Sequence[RecordFile]
    disk: DiskChoice


def open_pack(path: Path, manifest: Manifest, asked: DiskIo, page_cache: PageCache) -> OpenPack:
    """Opens all files with experts; for ``auto`` in both ways, of which one is kept.

    Raises :class:`PackError` if one cannot be opened, or not mapped as it is asked for. One that
    is too short is opened all the same: records before the cut still serve.
    """

    def open_direct(spec: PackFile) -> RecordFile:
        return RecordFile(path / spec.name, direct=True)

    def open_mapped(spec: PackFile) -> RecordFile:
        return MappedFile(path / spec.name, page_cache=page_cache, num_bytes=spec.num_bytes)

    if asked is DiskIo.MMAP:
        files = _open_all(manifest.files, open_mapped)
        choice = DiskChoice(asked, DiskIo.MMAP, past_page_cache=False)
    else:
        files = _open_all(manifest.files, open_direct)
        past_page_cache = all(file.direct for file in files)
        choice = DiskChoice(asked, DiskIo.DIRECT, past_page_cache)
        if asked is DiskIo.AUTO:
            try:
                mapped = _open_all(manifest.files, open_mapped)
            except PackError as error:
                choice = replace(choice, trouble=str(error))
            else:
                files, choice = _choose(manifest, files, mapped, choice, page_cache)
    for file, spec in zip(files, manifest.files, strict=True):
        size = os.fstat(file.fd).st_size
        if size < spec.num_bytes:
            # Records before the cut still serve; those behind it fail one by one.
            log_warning("pack file truncated", file=str(file.path), bytes=size)
    return OpenPack(files, choice)


def _choose(
    manifest: Manifest,
    direct: list[RecordFile],
    mapped: list[RecordFile],
    choice: DiskChoice,
    page_cache: PageCache,
) -> tuple[list[RecordFile], DiskChoice]:
    """Tries both, and closes those of the slower way."""
    records = [
        TrialRead(file, offset, manifest.layouts[layer.layout].record_bytes)
        for layer in manifest.layers
        for file, offset in zip(layer.files, layer.offsets, strict=True)
    ]
    keeps_cache = manifest.expert_bytes <= page_cache.max_bytes
    trial = try_both(direct, mapped, choose_reads(records), keeps_cache=keeps_cache)
    way = faster(trial, past_page_cache=choice.past_page_cache)
    is_mapped = way is DiskIo.MMAP
    for file in direct if is_mapped else mapped:
        page_cache.remove(file, drop=True)  # what the trial has left there
        file.close()
    return mapped if is_mapped else direct, replace(
        choice,
        way=way,
        past_page_cache=choice.past_page_cache and not is_mapped,
        trial=trial,
    )


def _open_all(
    specs: Sequence[PackFile], open_one: Callable[[PackFile], RecordFile]
) -> list[RecordFile]:
    with ExitStack() as opened:
        files = []
        for spec in specs:
            file = open_one(spec)
            opened.callback(file.close)
            files.append(file)
        opened.pop_all()
    return files


def _rate(bytes_per_second: float) -> str:
    return f"{format_bytes(int(bytes_per_second))}/s"
