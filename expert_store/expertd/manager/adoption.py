"""Taking over the records of the daemon before us: each is verified before it is served.

A directory's words are claims. One is granted if it leads into the arena, if the bytes there
have the checksum that the pack's manifest gives the record, and if no granted record lies
there: of two that overlap at most one can have its checksum. What fails is dropped: its word
is zeroed, its room is free, and it is read from the pack when somebody asks for it.
"""

import asyncio
import os
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from xxhash import xxh3_64_hexdigest

from expertd.hosting.hosted_model import HostedModel
from expertd.log import log, log_warning
from expertd.memory.arena import Arena
from expertd.memory.extents import Extent, Extents
from expertstore.shared.directory import ABSENT, unpack_word
from expertstore.sizes import format_bytes

_BATCH_BYTES = 64 << 20
_PROGRESS_SECONDS = 2.0


class Claim(NamedTuple):
    """A record that the directory says is resident."""

    entry: int
    extent: Extent
    checksum: str


async def adopt_records(model: HostedModel, arena: Arena, extents: Extents) -> None:
    """Makes resident what ``model``'s directory rightly claims, and drops the rest."""
    began = time.monotonic()
    claims, astray = read_claims(model, arena.num_bytes)
    sound = await asyncio.to_thread(verify, model.name, arena, claims)
    kept: dict[int, Extent] = {}
    for claim, is_sound in zip(claims, sound, strict=True):
        if not is_sound:
            continue
        try:
            extents.take(claim.extent)
        except ValueError:  # another record of the same bytes was there first
            continue
        kept[claim.entry] = claim.extent
    dropped = astray + [claim.entry for claim in claims if claim.entry not in kept]
    model.adopt(kept, dropped)
    for entry in dropped:
        layer, expert = model.expert(entry)
        log_warning("record dropped", model=model.name, layer=layer, expert=expert)
    num_bytes = sum(extent.num_bytes for extent in kept.values())
    log(
        "model adopted",
        model=model.name,
        records=len(kept),
        bytes=num_bytes,
        dropped=len(dropped),
        seconds=round(time.monotonic() - began, 3),
    )


def read_claims(model: HostedModel, num_bytes: int) -> tuple[list[Claim], list[int]]:
    """The claims that lead into an arena of ``num_bytes``, and the entries of those that do not."""
    claims: list[Claim] = []
    astray: list[int] = []
    for entry in range(model.num_entries):
        word = model.directory.word(entry)
        if word == ABSENT:
            continue
        location = unpack_word(word)
        size = model.record_bytes(entry)
        if location is not None and 0 <= location.offset <= num_bytes - size:
            extent = Extent(location.offset, size)
            claims.append(Claim(entry, extent, model.place(entry).checksum))
        else:
            astray.append(entry)
    return claims, astray


def verify(name: str, arena: Arena, claims: Sequence[Claim]) -> list[bool]:
    """Whether the bytes of each are those of the record. Takes all cores."""

    def check(batch: Sequence[Claim]) -> list[bool]:
        return [
            xxh3_64_hexdigest(view[offset : offset + size]) == checksum
            for _, (offset, size), checksum in batch
        ]

    total = sum(claim.extent.num_bytes for claim in claims)
    done, said = 0, time.monotonic()
    sound: list[bool] = []
    with arena.view as view, ThreadPoolExecutor(os.cpu_count()) as pool:
        batches = list(_batches(claims))
        for batch, results in zip(batches, pool.map(check, batches), strict=True):
            sound += results
            done += sum(claim.extent.num_bytes for claim in batch)
            if time.monotonic() > said + _PROGRESS_SECONDS:
                said = time.monotonic()
                log("verifying", model=name, done=format_bytes(done), of=format_bytes(total))
    return sound


def _batches(claims: Sequence[Claim]) -> Iterator[Sequence[Claim]]:
    """Runs of enough bytes that the threads' work is in the bytes."""
    start, num_bytes = 0, 0
    for index, claim in enumerate(claims):
        num_bytes += claim.extent.num_bytes
        if num_bytes >= _BATCH_BYTES:
            yield claims[start : index + 1]
            start, num_bytes = index + 1, 0
    if start < len(claims):
        yield claims[start:]
