"""More model than RAM: tokens per second when experts must be read from disk while decoding.

A model of Qwen3-30B-A3B's shape with random 4-bit weights, all 48 layers (16 GB of experts) if
this host has the memory and the disk, of which RAM has room for all, a half or a quarter. *uniform*
routing draws every token's experts evenly, as random routers do: the worst case, since no cache can
hit more often than its share. *replayed* routing is a real run's (its trace was recorded with 6
experts per token, so all have 6). Hints are replayed too: one layer ahead, each right with a
probability of 0.85.

- *ours*: the daemon has the budget, locked. It reads past the page cache, which gives it nothing
- *mapped*: the same trunk, kernels and routing, with the pack's files mapped, as stock loaders do;
  the process is in a control group that limits its memory, page cache included, to what it had
  without experts plus the budget. Pages are read when the kernels touch them
- *announced*: the same, but each layer's experts are announced to the system (`MADV_WILLNEED`)
  before they are computed, which is as well as mapping can do
- *ours, direct* and *ours, mmap*: two daemons in turns, when the mapping process has ended, one as
  *ours* and one with `disk_io = "mmap"`, which leaves up to 64 MiB in the page cache besides

Memory is filled before it is measured, and the tokens before those that count are replayed without
computing. The *bound* is what the disk, probed before every turn with records of this size, allows
for the bytes that ours read. `bench.decode` has llama.cpp at the same shape.

Example: python -m bench spill --dir /var/lib/expertd
"""

import os
import random
import shutil
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bench.ablation import EXPERTS_PER_TOKEN, RECALL, SHAPE
from bench.figures import Bench, Figure, compared, quartiles
from bench.gpu_routing import routing_for
from bench.memory_limit import MemoryLimit, NoLimitError
from bench.page_cache import forget_file
from bench.results import Curve, Plot, Table
from bench.synthetic import SHAPES, make_pack
from bench.tiers import EndedError, Tally, TierProcess, slower_ways, workers
from expertd.settings.disk_io import DiskIo
from expertd_inference.advice.probes import StorageProbe
from expertd_testing.daemon import serving
from expertstore.pack.manifest import Manifest, read_manifest
from expertstore.shared.host_memory import memory_available

PART = "spill"
SHARES = (1.0, 0.5, 0.25)
UNIFORM, REPLAYED = "uniform", "replayed"
OURS, MAPPED, ANNOUNCED = "ours", "mapped", "announced"
OURS_DIRECT, OURS_MMAP = "ours, direct", "ours, mmap"
GOAL_OF_RATE = 0.8
"""Of what the disk gives, while reading takes longer than computing."""
_RESERVE_BYTES = 5 << 30
"""For two trunks, three Pythons with torch, and the system."""
_SLACK_BYTES = 64 << 20
"""More than its budget for the mapped, and a 64th of that: page tables, and pages on their way."""
_TOKENS, _WARM = 128, 40
_PROBE_SECONDS = 0.4


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    shares: Sequence[float] = SHARES
    turns: int = 3
    turn_seconds: float = 3.0
    layers: int = SHAPES[SHAPE]["num_hidden_layers"]
    overrides: dict[str, Any] = field(
        default_factory=lambda: {"num_experts_per_tok": EXPERTS_PER_TOKEN}
    )


TINY = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
    "num_experts_per_tok": EXPERTS_PER_TOKEN,
}
_QUICK = Plan((0.5,), 1, 0.3, 4, TINY)


@dataclass(frozen=True)
class Model:
    """The pack, and which experts its tokens use, by routing: [tokens][layers][k]."""

    pack: Path
    manifest: Manifest
    rows: dict[str, list[list[list[int]]]]

    @property
    def files(self) -> list[Path]:
        """With experts."""
        return [self.pack / file.name for file in self.manifest.files]


Tallies = dict[tuple[float, str, str], Tally]
"""By share, routing and who."""


def measure(bench: Bench) -> Iterator[Figure | Table | Plot | str]:
    """All budgets, the largest first."""
    plan = _QUICK if bench.quick else Plan()
    tallies: Tallies = {}
    model = yield from _model(bench, plan)
    for share in plan.shares:
        yield from _measure(bench, plan, model, share, tallies)
        yield from _figures(share, tallies)
    yield from slower_ways(tallies)
    yield _table(model, tallies)
    for routing in model.rows:
        yield _plot(routing, tallies)


def _model(bench: Bench, plan: Plan) -> Iterator[str]:
    layers, why = _layers_that_fit(bench, plan)
    if why:
        yield why
    bench.say(f"making {layers} layers of {SHAPE}")
    pack = make_pack(
        bench.folder / "pack", SHAPE, "4bit", layers, overrides=plan.overrides, own_places=True
    )
    manifest = read_manifest(pack).manifest
    experts = manifest.layers[0].num_experts
    chance = random.Random(0)
    rows = {
        UNIFORM: [
            [chance.sample(range(experts), EXPERTS_PER_TOKEN) for _ in range(layers)]
            for _ in range(_TOKENS)
        ]
    }
    routing = routing_for(SHAPE, layers, experts, EXPERTS_PER_TOKEN, _TOKENS, bench.traces)
    if "replayed" in routing.what:
        rows[REPLAYED] = routing.experts.tolist()
    else:
        yield f"replayed routing: no trace of a {SHAPE} was found"
    model = Model(pack, manifest, rows)
    for path in model.files:
        forget_file(path)  # written, and out of the way of what is measured
    return model


def _layers_that_fit(bench: Bench, plan: Plan) -> tuple[int, str]:
    """How many layers this host can have in RAM whole, and on disk; and what to say of it."""
    config = {**SHAPES[SHAPE], **plan.overrides}
    weights = 3 * config["num_experts"] * config["hidden_size"] * config["moe_intermediate_size"]
    layer_bytes = weights * 4.5 / 8
    room = min(memory_available(), shutil.disk_usage(bench.folder).free) - _RESERVE_BYTES
    layers = max(1, min(plan.layers, int(room / layer_bytes)))
    if layers == plan.layers:
        return layers, ""
    return layers, (
        f"all {plan.layers} layers: {room / 2**30:.0f} GiB were free in RAM and on disk, beside a "
        f"reserve, so the model was cut to {layers}"
    )


def _measure(
    bench: Bench, plan: Plan, model: Model, share: float, tallies: Tallies
) -> Iterator[str]:
    ram = max(int(model.manifest.expert_bytes * share), model.manifest.working_set_bytes)
    makers: dict[str, Callable[[ExitStack], TierProcess]] = {
        OURS: lambda stack: _ours(bench, stack, model, ram, OURS),
        MAPPED: lambda stack: _mapped(stack, model, ram),
        OURS_DIRECT: lambda stack: _ours(bench, stack, model, ram, OURS_DIRECT),
        OURS_MMAP: lambda stack: _ours(bench, stack, model, ram, OURS_MMAP),
    }
    # A process that maps the pack keeps it in the page cache, from which mmap's daemon would read.
    groups = [[OURS, MAPPED], [OURS_DIRECT, OURS_MMAP]] if share < 1 else [[OURS, MAPPED]]
    # Side by side if there is room for both, else one after the other.
    both = 2 * ram + _RESERVE_BYTES < memory_available()
    for names in groups if both else [[name] for group in groups for name in group]:
        with ExitStack() as stack:
            processes = {}
            for name in names:
                bench.say(f"{share:.0%} in RAM: {name}, filling {ram / 2**30:.1f} GiB")
                try:
                    processes[name] = makers[name](stack)
                    processes[name].do(name, "fill", num_bytes=ram)
                except NoLimitError as error:
                    yield f"mapped files under the same limit, {share:.0%}: {error}"
                except EndedError:
                    yield f"{name}, {share:.0%}: its process ended, maybe for want of memory"
            processes = {name: each for name, each in processes.items() if each.is_running}
            for routing in model.rows:
                _take_turns(bench, plan, model, processes, (share, routing), tallies)


def _ours(bench: Bench, stack: ExitStack, model: Model, ram: int, name: str) -> TierProcess:
    way = DiskIo.MMAP if name == OURS_MMAP else DiskIo.DIRECT
    for path in model.files:
        forget_file(path)
    socket, config = bench.folder / f"{way}{ram}", bench.folder / "page-cache.toml"
    config.write_text(f"page_cache = {_SLACK_BYTES}\n")
    arguments = ["--disk-io", way]
    daemon = stack.enter_context(
        serving({"m": model.pack}, ram=ram, socket=socket, config=config, arguments=arguments)
    )
    job = {
        "pack": model.pack,
        "socket": daemon.socket,
        "reader": daemon.pid,
        "speculate_layers": 1,
        "recall": RECALL,
    }
    return stack.enter_context(workers({name: job}))


def _mapped(stack: ExitStack, model: Model, ram: int) -> TierProcess:
    # Pages that others have brought into the page cache would not count as this process's.
    for path in model.files:
        forget_file(path)
    limit = stack.enter_context(MemoryLimit("expertd-bench"))
    process = stack.enter_context(workers({MAPPED: {"pack": model.pack, "mapped": True}}, limit))
    trunk = model.manifest.trunk.num_bytes
    limit.set(limit.anonymous_bytes() + trunk + ram + ram // 64 + _SLACK_BYTES)
    return process


def _take_turns(
    bench: Bench,
    plan: Plan,
    model: Model,
    processes: dict[str, TierProcess],
    case: tuple[float, str],
    tallies: Tallies,
) -> None:
    share, routing = case
    rows = model.rows[routing]
    ways = {name: (name, False) for name in processes}
    if MAPPED in processes and share < 1:
        ways[ANNOUNCED] = (MAPPED, True)
    for name in processes:
        bench.say(f"{share:.0%} in RAM, {routing}, {name}: the tokens before")
        # Of uniform routing any experts are as good as others.
        processes[name].do(name, "warm", rows=rows[: _WARM if routing == REPLAYED else 1])
    place = dict.fromkeys(processes, _WARM)
    record_bytes = model.manifest.max_record_bytes
    with StorageProbe(model.pack, piece_bytes=record_bytes) as probe:
        for number in range(plan.turns):
            for way, (name, announced) in ways.items():
                bench.say(f"{share:.0%} in RAM, {routing}, {way}: {number + 1} of {plan.turns}")
                rate = probe.rate(_PROBE_SECONDS)
                some = [rows[(place[name] + n) % len(rows)] for n in range(_TOKENS - _WARM)]
                answer = processes[name].do(
                    name,
                    "decode",
                    ids=list(range(3, 3 + len(some))),
                    rows=some,
                    announced=announced,
                    seconds=plan.turn_seconds,
                )
                place[name] += len(answer["seconds"]) + 1
                tallies.setdefault((share, routing, way), Tally()).add(answer, rate)


def _figures(share: float, tallies: Tallies) -> Iterator[Figure]:
    for (of, routing, name), tally in tallies.items():
        if of == share and name == OURS_MMAP:
            direct = tallies.get((share, routing, OURS_DIRECT))
            if direct is not None:
                pairs = list(zip(tally.speeds, direct.speeds, strict=True))
                what = f"{share:.0%} in RAM, {routing}: ours, mmap / direct"
                yield compared(PART, what, "tokens/s", pairs)
        if of != share or name != OURS:
            continue
        what = f"{share:.0%} in RAM, {routing}"
        for other in (MAPPED, ANNOUNCED):
            if (rival := tallies.get((share, routing, other))) is not None:
                pairs = list(zip(tally.speeds, rival.speeds, strict=True))
                yield compared(PART, f"{what}: ours / {other}", "tokens/s", pairs)
        if not all(tally.num_bytes):
            continue
        pairs = [
            (speed * num_bytes / 1e9, bound * num_bytes / 1e9)
            for speed, num_bytes, bound in zip(
                tally.speeds, tally.num_bytes, tally.bounds, strict=True
            )
        ]
        whole = tallies.get((1.0, routing, OURS))
        # Where computing takes longer than reading, the disk has to wait.
        lasts = whole is not None and statistics.median(tally.bounds) < statistics.median(
            whole.speeds
        )
        goal = GOAL_OF_RATE if lasts and share < 1 else None
        yield compared(PART, f"{what}: ours reads / the disk", "GB/s", pairs, at_least=goal)


def _table(model: Model, tallies: Tallies) -> Table:
    rows = []
    for (share, routing, name), tally in tallies.items():
        low, high = quartiles(tally.speeds)
        num_bytes = statistics.median(tally.num_bytes)
        bound = statistics.median(tally.bounds)
        speed = statistics.median(tally.speeds)
        rows.append(
            (
                f"{share:.0%}",
                routing,
                name,
                f"{speed:.3g} ({low:.3g} to {high:.3g})",
                f"{num_bytes / 1e6:.3g}",
                f"{bound:.3g}" if num_bytes else "none",
                f"{speed / bound:.2f}" if num_bytes else "",
                tally.hints_text,
            )
        )
    manifest = model.manifest
    return Table(
        f"{len(manifest.layers)} layers of {SHAPE}, experts {manifest.expert_bytes / 1e9:.1f} GB",
        (
            "in RAM",
            "routing",
            "loading",
            "tokens/s",
            "MB read a token",
            "the disk allows, tokens/s",
            "share",
            "hinted experts",
        ),
        tuple(rows),
        f"A token uses {manifest.working_set_bytes / 1e6:.0f} MB of experts. The system reads"
        f" {_read_ahead(model.pack)} ahead when a mapped page is touched.",
    )


def _read_ahead(path: Path) -> str:
    device = path.stat().st_dev
    place = Path(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}")
    for queue in (place / "queue", place / ".." / "queue"):
        if (queue / "read_ahead_kb").exists():
            return f"{int((queue / 'read_ahead_kb').read_text())} KiB"
    return "an unknown number of bytes"


def _plot(routing: str, tallies: Tallies) -> Plot:
    curves = []
    for name in (OURS, OURS_MMAP, MAPPED, ANNOUNCED):
        found = sorted(
            (share, tally)
            for (share, of, who), tally in tallies.items()
            if (of, who) == (routing, name)
        )
        if not found:
            continue
        spread = [quartiles(tally.speeds) for _, tally in found]
        curves.append(
            Curve(
                name,
                tuple(100 * share for share, _ in found),
                tuple(statistics.median(tally.speeds) for _, tally in found),
                tuple(low for low, _ in spread),
                tuple(high for _, high in spread),
                dashed=name != OURS,
            )
        )
        bounds = [(share, tally.bounds) for share, tally in found if all(tally.num_bytes)]
        if name == OURS and bounds:
            shares = tuple(100 * share for share, _ in bounds)
            limits = tuple(statistics.median(each) for _, each in bounds)
            curves.append(Curve("what the disk allows ours", shares, limits, dashed=True))
    return Plot(
        f"spill-{routing}",
        f"More model than RAM, {routing} routing",
        "experts in RAM, %",
        "tokens/s",
        tuple(curves),
        y_log=True,
    )
