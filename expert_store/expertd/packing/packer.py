"""From a checkpoint to a pack: a few tensors in memory at a time, resumable, whole or absent.

The work lies in ``DST.partial``, beside the pack to be::

    DST.partial/journal    what is done
    DST.partial/pack/      the pack, renamed to DST when it is complete
    DST.partial/hub/       what is here of a checkpoint that is fetched meanwhile
    DST.partial/gguf/      a model in GGUF as a checkpoint

1. Refuse what cannot work: the destination, the checkpoint, the scheme.
2. Take up the journal if it is of the same packing, else begin anew.
3. Write headers and reserve the disk space of every file.
4. Do the steps that the journal lacks: read, quantize, write, note.
5. Copy configuration and tokenizer, write the manifest, flush, rename.
"""

import errno
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import msgspec
from xxhash import xxh3_64_hexdigest

import expertstore
from expertd.packing.checkpoint import MIN_TABLE_BYTES, Checkpoint
from expertd.packing.early import GGUF_FOLDER, HUB_FOLDER, check_destination, partial_of
from expertd.packing.encoder import Encoder
from expertd.packing.feeding import Feeder
from expertd.packing.finished_files import file_checksum, flush
from expertd.packing.journal import Journal
from expertd.packing.notices import Flawed, peculiarities
from expertd.packing.pipeline import encode_ahead
from expertd.packing.plan import (
    MAX_FILE_BYTES,
    PackPlan,
    make_manifest,
    make_plan,
)
from expertd.packing.schemes import PARTS, Scheme
from expertd.packing.shards import Shards
from expertd.packing.side_files import find_side_files
from expertd.packing.solver import ChosenSolver, Solver, choose_solver
from expertstore.errors import CheckpointError, PackError
from expertstore.pack.layout import Encoding
from expertstore.pack.manifest import FORMAT_VERSION, MANIFEST_NAME, encode_manifest
from expertstore.pack.table import TableEncoding

COMMIT_SECONDS = 1.0
COMMIT_BYTES = 256 << 20
"""How much work an interruption may cost; each commit waits for the disk."""


@dataclass(frozen=True)
class Progress:
    """How far a packing is. Bytes are those of the weights in the checkpoint."""

    done_steps: int
    total_steps: int
    done_bytes: int
    total_bytes: int
    resumed_bytes: int
    """Of ``done_bytes``, what an earlier run had done."""


@dataclass(frozen=True)
class Request:
    """What is to be packed, where to, and how."""

    source: Path
    destination: Path
    scheme: Scheme
    optimize: bool = True
    device: str = "cpu"
    """Where the weights are quantized: cpu, cuda or cuda:N."""
    force: bool = False
    """Replace the pack at ``destination``, and pack weights that are not finite."""
    tables: TableEncoding = TableEncoding.PLAIN
    """How rows of tables are written."""
    table_bytes: int = MIN_TABLE_BYTES
    """What embeddings that can be tables have at least in 16 bits; others stay in the trunk."""
    max_file_bytes: int = MAX_FILE_BYTES
    """Of each file of records; a larger record gets a file of its own."""
    text_only: bool = False
    """Leave the vision part out."""
    shards: Shards | None = None
    """Brings the files of ``source`` one by one, where they are not all there."""


def pack(
    request: Request,
    *,
    on_progress: Callable[[Progress], None] = lambda _: None,
    on_notice: Callable[[str], None] = lambda _: None,
) -> None:
    """Makes the pack at ``request.destination``.

    ``on_notice`` gets sentences for the user: resumed, begun anew, tensors left out. Raises
    :class:`CheckpointError` and :class:`PackError`; ConfigError and PreconditionError for a device.
    """
    chosen = choose_solver(request.device)
    try:
        with Checkpoint(
            request.source,
            request.shards,
            table_bytes=request.table_bytes,
            text_only=request.text_only,
        ) as checkpoint:
            sees = checkpoint.architecture.sees
            side_files = find_side_files(request.source, sees=sees)
            _pack(request, checkpoint, chosen, side_files, on_progress, on_notice)
    except BrokenPipeError:  # of what on_notice writes to
        raise
    except OSError as error:
        where = error.filename or request.destination
        raise PackError(f"{where} cannot be used: {error.strerror}.") from error


def _pack(
    request: Request,
    checkpoint: Checkpoint,
    chosen: ChosenSolver,
    side_files: Sequence[Path],
    on_progress: Callable[[Progress], None],
    on_notice: Callable[[str], None],
) -> None:
    destination = request.destination
    partial = partial_of(destination)
    key = _key(request, checkpoint, chosen.solver)
    if _was_completed(destination, partial, key):
        on_notice(f"{destination} was complete already.")
        shutil.rmtree(partial)
        return
    check_destination(destination, force=request.force)
    if chosen.drawback and request.optimize and _quantizes(request.scheme):
        on_notice(chosen.drawback)
    for sentence in peculiarities(checkpoint, request.scheme):
        on_notice(sentence)
    plan = make_plan(checkpoint, request.scheme, request.max_file_bytes, request.tables)
    if plan.misfits:
        more = len(plan.misfits) - 1
        on_notice(
            f"{plan.misfits[0]}: it stays in 16 bits"
            + (f", and so do {more} more matrices of the trunk." if more else ".")
        )
    try:
        _check_partial(partial)
        (partial / "pack").mkdir(parents=True, exist_ok=True)
        with Journal(partial / "journal", key) as journal:
            try:
                _prepare(plan, partial, journal, on_notice)
                encoder = Encoder(checkpoint, chosen.solver, request.optimize)
                flawed = Flawed(request.force, on_notice)
                feeder = Feeder(plan, checkpoint, journal.done, request.shards)
                _run_steps(plan, encoder, partial, journal, on_progress, flawed, feeder)
                flawed.conclude()
                _finish(plan, checkpoint, request, side_files, partial, journal)
            except CheckpointError as error:
                raise CheckpointError(f"{error} {_kept(journal, plan, partial)}") from error
    except BrokenPipeError:
        raise
    except OSError as error:
        raise PackError(_cannot_write(error, plan, partial)) from error


def _was_completed(destination: Path, partial: Path, key: str) -> bool:
    """Whether a run with that key ended between its last rename and its cleaning up."""
    journal = partial / "journal"
    return (
        (destination / MANIFEST_NAME).is_file()
        and journal.is_file()
        and not (partial / "pack").exists()
        and journal.read_bytes().startswith(f"{key}\n".encode())
    )


def _check_partial(partial: Path) -> None:
    """Nothing that is not ours may be lost when a packing begins anew."""
    if partial.exists() and not (partial / "journal").exists():
        foreign = sorted(
            {entry.name for entry in partial.iterdir()} - {"pack", HUB_FOLDER, GGUF_FOLDER}
        )
        if foreign:
            raise PackError(f"{partial} is needed for the work and holds other files; move them.")


def _quantizes(scheme: Scheme) -> bool:
    """Whether a solver has anything to do."""
    precisions = [getattr(scheme, part) for part in PARTS]
    return any(each.bits and each.encoding is Encoding.HQQ for each in precisions)


def _key(request: Request, checkpoint: Checkpoint, solver: Solver) -> str:
    """One line that is the same when the resulting bytes are."""
    return msgspec.json.encode(
        {
            "checkpoint": checkpoint.fingerprint,
            "scheme": msgspec.to_builtins(request.scheme),
            "optimize": request.optimize,
            "max_file_bytes": request.max_file_bytes,
            "architecture": checkpoint.architecture.name,
            "sees": checkpoint.architecture.sees,
            "tables": [request.tables, request.table_bytes],
            "format": FORMAT_VERSION,
            "versions": [expertstore.__version__, version("torch"), solver.version],
        }
    ).decode()


def _prepare(
    plan: PackPlan, partial: Path, journal: Journal, notice: Callable[[str], None]
) -> None:
    """Leaves files of full size with their headers, and a journal that fits them."""
    folder = partial / "pack"
    if journal.matches and all(
        (folder / file.name).exists() and (folder / file.name).stat().st_size == file.num_bytes
        for file in plan.files
    ):
        if journal.done:
            notice(f"Going on after {len(journal.done)} of {len(plan.steps)} steps.")
        return
    if journal.done or (not journal.matches and any(folder.iterdir())):
        notice(f"{partial} is of another packing; beginning anew.")
    shutil.rmtree(folder)
    folder.mkdir()
    for file in plan.files:
        with (folder / file.name).open("wb") as out:
            out.write(file.header)
            out.flush()
            # So that a full disk is met now, and not after hours of quantizing.
            os.posix_fallocate(out.fileno(), 0, file.num_bytes)
    journal.begin()


def _run_steps(
    plan: PackPlan,
    encoder: Encoder,
    partial: Path,
    journal: Journal,
    on_progress: Callable[[Progress], None],
    flawed: Flawed,
    feeder: Feeder,
) -> None:
    total_bytes = sum(step.source_bytes for step in plan.steps)
    done_bytes = resumed = sum(plan.steps[index].source_bytes for index in journal.done)
    fds: list[int] = []
    dirty: set[int] = set()
    last_commit, uncommitted_bytes = time.monotonic(), 0

    def report() -> None:
        on_progress(Progress(len(journal.done), len(plan.steps), done_bytes, total_bytes, resumed))

    try:
        for file in plan.files:
            fd = os.open(partial / "pack" / file.name, os.O_WRONLY | os.O_CLOEXEC)
            fds.append(fd)  # one by one, so that an error closes those that are open
        with closing(encode_ahead(encoder.encode, feeder)) as encoded:
            report()
            for index, step, result in encoded:
                if result.flaws:
                    flawed.meet(result.flaws)
                _write(fds[step.file], result.data, step.offset)
                dirty.add(fds[step.file])
                # A run that goes on after an interruption is to tell of it again.
                lasting = not result.flaws
                journal.add(index, xxh3_64_hexdigest(result.data), lasting=lasting)
                done_bytes += step.source_bytes
                uncommitted_bytes += len(result.data)
                now = time.monotonic()
                if now - last_commit >= COMMIT_SECONDS or uncommitted_bytes >= COMMIT_BYTES:
                    feeder.lasting(_commit(dirty, journal))
                    last_commit, uncommitted_bytes = time.monotonic(), 0
                report()
    finally:
        # Also when interrupted: what is done stays done.
        try:
            _commit(dirty, journal)
        finally:
            for fd in fds:
                os.close(fd)


def _commit(dirty: set[int], journal: Journal) -> list[int]:
    """Flushes the data of the files ``dirty``, then notes the steps that wrote it: these."""
    for fd in dirty:
        os.fdatasync(fd)
    dirty.clear()
    return journal.commit()


def _write(fd: int, data: memoryview, offset: int) -> None:
    while data:
        count = os.pwrite(fd, data, offset)
        data, offset = data[count:], offset + count


def _finish(
    plan: PackPlan,
    checkpoint: Checkpoint,
    request: Request,
    side_files: Sequence[Path],
    partial: Path,
    journal: Journal,
) -> None:
    folder = partial / "pack"
    for source in side_files:
        target = folder / source.relative_to(request.source)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
        flush(target)
    trunk = file_checksum(folder / plan.files[-1].name)
    manifest = make_manifest(plan, checkpoint, request.scheme, journal.done, trunk)
    (folder / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    for path in (*(folder / file.name for file in plan.files), folder / MANIFEST_NAME, folder):
        flush(path)
    destination = request.destination
    replaced = partial / "replaced"
    if os.path.lexists(destination):
        destination.rename(replaced)
    folder.rename(destination)
    flush(destination.parent)
    shutil.rmtree(partial)


def _kept(journal: Journal, plan: PackPlan, partial: Path) -> str:
    return (
        f"{len(journal.done)} of {len(plan.steps)} steps are done and kept in {partial}; the "
        "same command goes on there."
    )


def _cannot_write(error: OSError, plan: PackPlan, partial: Path) -> str:
    where = error.filename or partial
    if error.errno == errno.ENOSPC:
        return (
            f"The disk of {partial.parent} is full: the pack needs {plan.num_bytes / 2**30:.2f} "
            "GiB. Free some, and the same command goes on where it was."
        )
    return f"{where} cannot be written: {error.strerror}."
