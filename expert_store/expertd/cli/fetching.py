"""For ``expertd pack ORG/NAME``: the checkpoint's directory, what it needs, a scheme for it."""

import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import msgspec
import typer

from expertd.cli.progress import ProgressDisplay
from expertd.hub.folder import HubFolder
from expertd.hub.gguf_files import fetch_gguf, find_gguf
from expertd.hub.opening import cached_snapshot, open_repository
from expertd.hub.reference import HubReference
from expertd.packing.default_scheme import default_scheme
from expertd.packing.early import HUB_FOLDER, about_bytes, partial_of
from expertd.packing.schemes import SCHEMES, Scheme
from expertd.packing.side_files import COPIED_FILES
from expertstore.errors import PackError, PreconditionError
from expertstore.interrupts import interruptible
from expertstore.shared.host_memory import memory_total
from expertstore.sizes import format_bytes


class FetchMeter:
    """Bytes of shards that came."""

    def __init__(self) -> None:
        self.num_bytes = 0
        self.on_change: Callable[[], None] = lambda: None

    def add(self, num_bytes: int) -> None:
        """From the thread that fetches."""
        self.num_bytes += num_bytes
        self.on_change()


def look_at(
    reference: HubReference, destination: Path, meter: FetchMeter, stack: ExitStack, *, keep: bool
) -> tuple[Path, HubFolder | None]:
    """The checkpoint's directory, and what fetches its shards unless they are all there.

    Of a model in GGUF its file, which is fetched whole.

    Raises CheckpointError, PackError and PreconditionError.
    """
    snapshot = cached_snapshot(reference)
    if snapshot is not None:
        typer.echo(f"{reference} is taken from the cache, {snapshot}.", err=True)
        return snapshot, None
    title = f"looking at {reference}"
    with interruptible(), ProgressDisplay(title) as display:
        repository = open_repository(reference)
        if files := find_gguf(repository):
            place = None if keep else partial_of(destination) / HUB_FOLDER / repository.commit
            total = sum(file.num_bytes for file in files)
            came = 0

            def count(num_bytes: int) -> None:
                nonlocal came
                came += num_bytes
                display.update(came, total, f"of {len(files)} files in GGUF")

            found = fetch_gguf(repository, files, place, count, place=destination.parent)
            return found, None
        folder = HubFolder(
            repository, partial_of(destination) / HUB_FOLDER, keep=keep, on_bytes=meter.add
        )
        stack.enter_context(folder)
        try:
            folder.prepare(
                COPIED_FILES, lambda done, total: display.update_count(done, total, "files")
            )
        except OSError as error:
            where = error.filename or folder.path
            raise PackError(f"{where} cannot be written: {error.strerror}.") from error
    return folder.path, folder


def needs(folder: HubFolder, scheme: Scheme) -> str:
    """What the packing will take, as a sentence."""
    experts, rest = about_bytes(folder.path, scheme)
    shards = folder.shards.values()
    here = f"of which at most {format_bytes(folder.most_bytes)} are here at a time"
    if not folder.most_bytes:
        here = "which stay in the hub's cache"
    return (
        f"{folder.repository.reference} at {folder.repository.commit[:12]}: "
        f"{format_bytes(sum(shard.num_bytes for shard in shards))} to fetch in {len(shards)} "
        f"files, {here}. The pack takes about {format_bytes(experts + rest)} on the disk; in RAM "
        f"all its experts take {format_bytes(experts)}, and each worker {format_bytes(rest)} and "
        "its context."
    )


def advised_scheme(checkpoint: Path, destination: Path) -> tuple[str, str]:
    """The scheme that ``expert-run advise`` chooses for this host, and its sentence.

    Weights that come quantized stay as they are if RAM can hold that. Raises PreconditionError if
    the host cannot serve the model in any scheme, and if nobody can tell.
    """
    kept = default_scheme(checkpoint)
    if kept != "4bit" and sum(about_bytes(checkpoint, SCHEMES[kept])) <= memory_total():
        return kept, "Its weights come quantized, and stay as they are."
    typer.echo("Measuring this host to choose a scheme; --scheme NAME leaves that out.", err=True)
    program = Path(sys.executable).with_name("expert-run")
    done = subprocess.run(
        [program, "advise", "--json", "--model", checkpoint, "--dir", destination.parent],
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise PreconditionError(
            f"`expert-run advise` cannot choose a scheme ({reason}); name one with --scheme, such "
            "as 4bit."
        )
    found = msgspec.json.decode(done.stdout, type=_Advice)
    if found.choice is None:
        raise PreconditionError(f"{found.why} To pack it for another host, give a --scheme.")
    return found.choice.scheme, found.why


class _Choice(msgspec.Struct):
    scheme: str


class _Advice(msgspec.Struct):
    choice: _Choice | None
    why: str
