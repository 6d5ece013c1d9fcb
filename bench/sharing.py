"""One copy for many workers: memory, speed, and how soon a worker gives its first token.

Workers are real processes on one daemon that holds all experts of a pack of OLMoE-1B-7B's shape
(random weights, every matrix in 4 bits), and generate at the same time.

- **Memory** is PSS, summed over the daemon and its workers: a page that several of them map counts
  once. *One copy* is the experts' records and the trunk's file. Beside it each worker has memory of
  its own: the Python interpreter with what it imports, and then its part of the trunk (embeddings
  and whatever else is not computed where it lies), keys and values, and buffers. The first figure
  leaves out these two, which the second table shows, and programs and libraries, which any process
  of Python has; in it are the arena, directory and session pages, the mapped trunk, and the whole
  daemon.
- **Speed** is beside workers whose experts lie in private memory of each, all else being the same.
  They run in turns with as many of ours, of as many threads. Where private copies would not fit
  beside the rest, the sum of the most that did stands for them. Then private copies are moved to
  huge pages, which the arena has, too, where the host's setting for shared memory allows it
  (`docs/tuning.md`): a row says how much of it had them.
- **Start** is from the process's start to its first token, after a prompt of 16, of the model cut
  to a few layers: ours beside stock `from_pretrained` of a bf16 checkpoint of as many, that is in
  the page cache. Both import torch and transformers, which takes seconds however small the model
  is, so it is shown with the imports and without. Ours are as few as can be (`docs/tuning.md` says
  which are left), and still most of its start: a third is torch's own. Who starts
  workers again and again lets a process fork that has imported all (`docs/generating.md`), and
  pays what is shown without the imports.

Example: python -m bench sharing
"""

import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from bench.checkpoint import checkpoint_bytes, make_checkpoint
from bench.figures import Bench, Figure, compared, quartiles
from bench.footprint import Footprint, footprint
from bench.peer import Peer
from bench.results import Curve, Plot, Table
from bench.synthetic import TINY, make_pack
from expertd.packing.schemes import choose_scheme
from expertd_client import Client
from expertd_testing.daemon import serving
from expertstore.pack.manifest import Manifest, read_manifest
from expertstore.shared.host_memory import memory_available

SHAPE = "olmoe-1b-7b"
WORKERS = (1, 2, 4, 8)
START_LAYERS = (8, 4, 2)
"""Of the model whose start is measured: the most whose checkpoint fits twice in free memory."""
_PRIVATE = (1, 2, 4)
_RESERVE_BYTES = 2 << 30
_WORKER_BYTES = 700 << 20
_ROUNDS = 6
_GIB, _MIB = 1 << 30, 1 << 20


@dataclass(frozen=True)
class _Group:
    """So many workers at once, so many threads each."""

    num_workers: int
    threads: int
    private: bool = False


def measure(bench: Bench) -> Iterator[Figure | Table | Plot | str]:
    """Memory and speed with one to eight workers, then the start of one."""
    bench.say("sharing: a pack")
    pack = _pack(bench, "pack", None)
    manifest = read_manifest(pack).manifest
    counts = (1,) if bench.quick else WORKERS
    with ExitStack() as stack:
        daemon = stack.enter_context(
            serving({"m": pack}, ram=manifest.expert_bytes, socket=bench.folder / "s")
        )
        fill(daemon.socket, manifest)
        ours: list[Peer] = []
        memory: dict[int, list[Footprint]] = {}
        for count in counts:
            bench.say(f"sharing: {count} of {max(counts)} workers")
            new = [_worker(daemon.socket, private=False) for _ in range(count - len(ours))]
            ours += [stack.enter_context(each) for each in new]
            for each in new:
                each.wait_ready()
            _window(ours, bench)
            memory[count] = [footprint(each.pid, pack) for each in (daemon, *ours)]
        yield from _memory_figures(manifest, pack, memory, ours)
        private: list[Peer] = []
        needed = manifest.expert_bytes + _WORKER_BYTES
        room = memory_available() - _RESERVE_BYTES
        for number in (1,) if bench.quick else _PRIVATE:
            if number * needed > room:
                break
            while len(private) < number:
                bench.say(f"sharing: private copy {len(private) + 1}")
                worker = stack.enter_context(_worker(daemon.socket, private=True))
                private.append(worker.wait_ready())
        if not private:
            yield (
                "speed beside private copies: one and what else is needed takes"
                f" {(needed + _RESERVE_BYTES) / _GIB:.1f} GiB, and so much is not free"
            )
        else:
            _window(private, bench)
            copies = [footprint(each.pid, pack) for each in private]
            if 2 * copies[0].shared > footprint(ours[0].pid, pack).shared:
                raise RuntimeError(f"the copies of the experts are not private: {copies}")
            yield _memory_plot(memory, copies)
            yield from _speed(bench, counts, ours, private)
            yield from _beside_huge(bench, daemon.socket, ours, private)
    yield from _start(bench)


def fill(socket: Path, manifest: Manifest, model: str = "m") -> None:
    """Has the daemon read every expert, or the last of them that fit."""
    with Client(socket) as store, store.attach(model) as session:
        for layer in manifest.layers:
            for lease in session.waves(layer.layer, range(layer.num_experts)):
                lease.release()


def _pack(bench: Bench, name: str, layers: int | None) -> Path:
    precision = "4g64"
    scheme = choose_scheme("4bit", precision, precision, precision, precision)
    overrides = TINY if bench.quick else None
    layers = 2 if bench.quick else layers
    return make_pack(bench.folder / name, SHAPE, scheme, layers, overrides=overrides)


def _worker(socket: Path, *, private: bool) -> Peer:
    arguments = {"socket": str(socket), "model": "m", "threads": 1, "private": private}
    # Ours is to find what a user's worker would, and the sources that are measured here.
    return Peer("ours", arguments, python=sys.executable, environment=os.environ)


def _window(workers: Sequence[Peer], bench: Bench) -> list[float]:
    """Tokens per second of each, generating at the same time."""
    seconds = 0.5 if bench.quick else 1.5
    # Prompts first: all are past theirs when the counting begins.
    begin = time.monotonic() + (0.3 if bench.quick else 0.5 + 0.25 * len(workers))
    for each in workers:
        each.send(f"window {begin} {begin + seconds}")
    return [float(each.answer()["rate"]) for each in workers]


def _memory_figures(
    manifest: Manifest, pack: Path, memory: dict[int, list[Footprint]], ours: Sequence[Peer]
) -> Iterator[Figure | Table]:
    one_copy = manifest.expert_bytes + manifest.trunk.num_bytes
    imports = statistics.mean(each.ready["own_before"] for each in ours)
    rows = []
    for count, (daemon, *workers) in memory.items():
        total = sum((daemon, *workers), Footprint())
        own = sum(each.own for each in workers)
        model = total.shared + total.pack + daemon.own
        yield compared(
            "sharing",
            f"{_counted(count)}: memory but for their own and for libraries / one copy",
            "GiB",
            [(model / _GIB, one_copy / _GIB)],
            at_most=1.05,
        )
        rows.append(
            (
                str(count),
                f"{total.total / _GIB:.2f}",
                f"{model / _GIB:.2f}",
                f"{imports / _MIB:.0f}",
                f"{(own / count - imports) / _MIB:.0f}",
                f"{total.files / _MIB:.0f}",
                f"{count * one_copy / _GIB:.2f}",
            )
        )
    yield Table(
        "Memory of the daemon and its workers",
        (
            "workers",
            "all, GiB",
            "the model and the daemon, GiB",
            "each worker's own: imports, MiB",
            "each worker's own: trunk, keys and values, buffers, MiB",
            "programs and libraries, once, MiB",
            "as many copies of the model, GiB",
        ),
        tuple(rows),
        f"One copy: {manifest.expert_bytes / _GIB:.2f} GiB of experts and"
        f" {manifest.trunk.num_bytes / _GIB:.2f} GiB of trunk.",
    )


def _memory_plot(memory: dict[int, list[Footprint]], copies: Sequence[Footprint]) -> Plot:
    counts = tuple(float(each) for each in memory)
    ours = tuple(sum(each.total for each in group) / _GIB for group in memory.values())
    # What processes of private copies share are libraries and the trunk's file.
    one = statistics.mean(each.own + each.shared for each in copies)
    rest = sum(each.files + each.pack for each in copies)
    private = tuple((count * one + rest) / _GIB for count in counts)
    return Plot(
        "sharing-memory",
        "Memory of all processes",
        "workers",
        "GiB (PSS)",
        (
            Curve("one shared copy, with its daemon", counts, ours),
            Curve(f"private copies (as {len(copies)} measured)", counts, private, dashed=True),
        ),
    )


def _speed(
    bench: Bench, counts: Sequence[int], ours: Sequence[Peer], private: Sequence[Peer]
) -> Iterator[Figure | Plot]:
    cores = os.cpu_count() or 1
    groups = [_Group(count, max(1, cores // count)) for count in counts]
    groups += [
        _Group(each.num_workers, each.threads, private=True)
        for each in groups
        if each.num_workers <= len(private)
    ]
    groups += [_Group(count, cores) for count in counts if max(1, cores // count) != cores]
    sums: dict[_Group, list[float]] = {group: [] for group in groups}
    rounds = _rounds(bench)
    for number in range(rounds):
        for group in groups if number % 2 else reversed(groups):
            copies = " with private copies" if group.private else ""
            bench.say(
                f"sharing: {group.num_workers} workers of {group.threads} threads{copies},"
                f" {number + 1} of {rounds}"
            )
            workers = (private if group.private else ours)[: group.num_workers]
            for each in workers:
                each.ask(f"threads {group.threads}")
            sums[group].append(sum(_window(workers, bench)))
    widest = max((each for each in groups if each.private), key=lambda each: each.num_workers)
    for group in groups[: len(counts)]:
        alike = _Group(group.num_workers, group.threads, private=True)
        name = _named(group)
        if alike in sums:
            each = [
                (mine / group.num_workers, theirs / group.num_workers)
                for mine, theirs in zip(sums[group], sums[alike], strict=True)
            ]
            what = f"{name}: each / each of as many private copies"
            yield compared("sharing", what, "tokens/s", each, at_least=0.95)
        else:
            turns = list(zip(sums[group], sums[widest], strict=True))
            what = f"{name}: their sum / the sum of {_named(widest)} with private copies"
            yield compared("sharing", what, "tokens/s", turns, at_least=0.95)
    for group in groups:
        fewer = _Group(group.num_workers, max(1, cores // group.num_workers))
        if not group.private and group != fewer:
            turns = list(zip(sums[group], sums[fewer], strict=True))
            what = f"{_named(group)}, too many: their sum / with {fewer.threads} each"
            yield compared("sharing", what, "tokens/s", turns)
    yield Plot(
        "sharing-speed",
        "Tokens per second of all workers together",
        "workers",
        "tokens/s",
        (
            _curve("one shared copy", groups[: len(counts)], sums),
            _curve(
                f"one shared copy, {cores} threads each",
                [_Group(count, cores) for count in counts],
                sums,
            ),
            _curve("private copies", [each for each in groups if each.private], sums, dashed=True),
        ),
    )


def _beside_huge(
    bench: Bench, socket: Path, ours: Sequence[Peer], private: Sequence[Peer]
) -> Iterator[Figure | str]:
    """As many as there are cores, of one thread each; private copies in huge pages."""
    count = min(os.cpu_count() or 1, len(ours), len(private))
    for each in private[:count]:
        bench.say("sharing: private copies to huge pages")
        if problem := each.ask("huge")["problem"]:
            yield f"speed beside private copies in huge pages: there are none ({problem})"
            return
    for each in (*ours[:count], *private[:count]):
        each.ask("threads 1")
    turns: list[tuple[float, float]] = []
    for _ in range(_rounds(bench)):
        mine, theirs = (sum(_window(each[:count], bench)) / count for each in (ours, private))
        turns.append((mine, theirs))
    with Client(socket) as store:
        arena = store.stats()["arena"]
    share = arena["huge_pages"] / arena["bytes_total"]
    name = _named(_Group(count, 1))
    what = f"{name}, {share:.0%} of the arena in huge pages: each / private copies, all in them"
    yield compared("sharing", what, "tokens/s", turns)


def _rounds(bench: Bench) -> int:
    return min(_ROUNDS, bench.rounds)


def _named(group: _Group) -> str:
    threads = "1 thread" if group.threads == 1 else f"{group.threads} threads"
    return f"{_counted(group.num_workers)} of {threads}"


def _counted(count: int) -> str:
    return "1 worker" if count == 1 else f"{count} workers"


def _curve(
    label: str, groups: Sequence[_Group], sums: dict[_Group, list[float]], *, dashed: bool = False
) -> Curve:
    spread = [quartiles(sums[group]) for group in groups]
    return Curve(
        label,
        tuple(float(group.num_workers) for group in groups),
        tuple(statistics.median(sums[group]) for group in groups),
        tuple(low for low, _ in spread),
        tuple(high for _, high in spread),
        dashed,
    )


def _start(bench: Bench) -> Iterator[Figure | Table | str]:
    """Ours beside stock from_pretrained, in turns."""
    overrides = TINY if bench.quick else None
    layers = 2
    if not bench.quick:
        # The page cache has the checkpoint while a process makes a model of it.
        room = memory_available() - _RESERVE_BYTES
        fitting = [each for each in START_LAYERS if 2.3 * checkpoint_bytes(SHAPE, each) < room]
        if not fitting:
            yield f"the start of a worker: stock transformers needs more than {room / _GIB:.1f} GiB"
            return
        layers = fitting[0]
    bench.say(f"sharing: a checkpoint and a pack of {layers} layers")
    checkpoint = make_checkpoint(bench.folder / "checkpoint", SHAPE, layers, overrides=overrides)
    pack = _pack(bench, "cut", layers)
    manifest = read_manifest(pack).manifest
    cores = os.cpu_count() or 1
    rounds = 1 if bench.quick else 4
    took: list[dict[str, tuple[float, float]]] = []
    with serving({"m": pack}, ram=manifest.expert_bytes, socket=bench.folder / "s") as daemon:
        fill(daemon.socket, manifest)
        for number in range(rounds):
            bench.say(f"sharing: starting, {number + 1} of {rounds}")
            arguments = {"path": str(checkpoint), "threads": cores}
            with Peer("stock", arguments, python=sys.executable) as stock:
                stock.wait_ready()
            with _worker(daemon.socket, private=False) as mine:
                mine.wait_ready()
            if number or bench.quick:  # the first brings files into the page cache
                took.append({name: (_phases(mine)[name], _phases(stock)[name]) for name in _PHASES})
    of = f"{SHAPE}, {layers} layers"
    for name, what, bound in (
        ("all", "from the process's start to the first token", 0.1),
        ("after", "the same without imports", 0.1),
    ):
        turns = [each[name] for each in took]
        yield compared("sharing", f"{of}: {what} / stock", "s", turns, at_most=bound)
    yield Table(
        f"From the process's start to the first token, {of}, seconds",
        ("", "ours", "stock from_pretrained, bf16"),
        tuple(
            (label, *(f"{statistics.median(t[name][who] for t in took):.2f}" for who in (0, 1)))
            for name, label in _PHASES.items()
        ),
    )


_PHASES = {
    "imports": "Python and its imports",
    "loading": "loading the model",
    "first": "the first token",
    "after": "both of these",
    "all": "all",
}


def _phases(peer: Peer) -> dict[str, float]:
    times = peer.ready
    return {
        "imports": times["imported"] - peer.started,
        "loading": times["loaded"] - times["imported"],
        "first": times["first"] - times["loaded"],
        "after": times["first"] - times["imported"],
        "all": times["first"] - peer.started,
    }
