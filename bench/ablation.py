"""Table 2 of the paper: tokens per second with all of the algorithm, and with less and less of it.

[Eliseev & Mazur](https://arxiv.org/abs/2312.17238) measured RAM to GPU; here the same steps go from
the disk to RAM, for a worker that computes on the CPU (`make gpu-bench` has the link to a GPU).

- *full*: what was used stays in RAM while there is room, and the next layer's experts are hinted at
  while a layer computes
- *no speculation*: without hints
- *no LRU*: nothing is kept from token to token, RAM being as large as one token's experts
- *whole layers*: all experts of a layer are read before it computes, and then dropped: what
  offloading by layers reads, of the same quantized bytes. The paper's *naive*
- *accelerate*: its own disk offload of the stock model of the same shape in 16 bits, run for real
  in a process of its own: 3.6 times the bytes of *whole layers*

Two models. *example* is the trained one, with its own routing and routers; its layers compute in
less time than a disk answers. *shape* has four layers of Qwen3-30B-A3B's size with random weights,
whose routing is replayed from a trace of that model (which was recorded with 6 experts per token);
with no trace at hand it is drawn by Zipf's law. Hints there are replayed too: each is right with a
probability of 0.85, which is what next-layer routers of trained models reach. RAM has room for a
half of the example's experts (4 of 8 per layer, the paper's setting for 16 GB) and a quarter of the
shape's. All take turns on the same disk, past the page cache, and beside each stands what the disk,
probed between the turns, allows for the bytes that were read.

Example: python -m bench ablation --dir /var/lib/expertd
"""

import importlib.util
import json
import statistics
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.figures import Bench, Figure, compared, counted, quartiles
from bench.gpu_routing import routing_for
from bench.results import Curve, Plot, Table
from bench.synthetic import config_of, make_pack
from bench.tiers import Tally, TierProcess, slower_ways, workers
from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_inference.advice.probes import StorageProbe
from expertd_testing.daemon import serving
from expertstore.pack.manifest import Manifest, read_manifest

PART = "ablation"
PAPER = {
    "A100": (3.061, 2.918, 2.265, 1.392),
    "3080 Mobile": (2.655, 2.227, 1.758, 1.059),
    "3060": (2.278, 2.051, 1.547, 0.919),
    "T4": (2.092, 1.567, 1.168, 0.661),
}
"""Its Table 2, Mixtral-8x7B with 2-bit experts: full, no speculation, no LRU, naive; tokens/s."""
FULL, PLAIN, NO_LRU, WHOLE, ACCELERATE = WAYS = (
    "full",
    "no speculation",
    "no LRU",
    "whole layers",
    "accelerate",
)
RECALL = 0.85
"""Of replayed hints: next-layer gates of trained models are right on 67 to 96 % of slots."""
SHAPE, LAYERS, EXPERTS_PER_TOKEN = "qwen3-30b-a3b", 4, 6
FEW_WORDS = {"vocab_size": 4096}
"""The head of so few layers would take most of a token."""
_EXAMPLE = Path(__file__).resolve().parent.parent / "examples/tiny-mixtral"
_OFFLOAD = Path(__file__).parent / "peers" / "offload.py"
_CONTEXT = 16
_WARM = 28
_PROBE_SECONDS = 0.4


@dataclass(frozen=True)
class Model:
    """A pack, what of it fits into RAM, and how many tokens each way has in a turn."""

    name: str
    pack: Path
    share: float
    tokens: dict[str, int]
    offload: dict[str, Any]
    rows: Any = None
    """Replayed routing, int64 [tokens, layers, k]; None: its own."""
    drawn: bool = False
    """The rows are not a trace's."""
    ids: tuple[int, ...] = ()
    """Text to decode, with the model's own routing."""


def measure(bench: Bench) -> Iterator[Figure | Table | Plot | str]:
    """All ways of both models, in turns."""
    turns = 1 if bench.quick else 5
    tallies: dict[str, dict[str, Tally]] = {}
    for make in (_example,) if bench.quick else (_example, _shape):
        with ExitStack() as stack:
            model = make(bench)
            if model.drawn:
                yield f"{model.name} with real routing: no trace of a {SHAPE} was found"
            processes, missing = _processes(bench, stack, model)
            if missing:
                yield missing
            tallies[model.name] = _take_turns(bench, model, processes, turns)
            yield from _figures(model.name, tallies[model.name])
            yield from slower_ways(tallies[model.name])
    yield from _tables(tallies)
    yield _plot(tallies)
    if bench.quick:
        yield f"{SHAPE}: left out of a quick run"


def _example(bench: Bench) -> Model:
    from transformers import AutoTokenizer

    bench.say("example: packing")
    path = bench.folder / "example"
    pack(Request(_EXAMPLE, path, choose_scheme("4bit", None, None), optimize=False))
    text = (_EXAMPLE / "heldout.txt").read_text()[4000:44000]
    ids = tuple(AutoTokenizer.from_pretrained(_EXAMPLE)(text, verbose=False).input_ids)
    tokens = {FULL: 32, PLAIN: 32, NO_LRU: 16, WHOLE: 8, ACCELERATE: 4}
    return Model("example", path, 0.5, tokens, {"checkpoint": str(_EXAMPLE)}, ids=ids)


def _shape(bench: Bench) -> Model:
    bench.say(f"shape: making {LAYERS} layers of {SHAPE}")
    overrides = {**FEW_WORDS, "num_experts_per_tok": EXPERTS_PER_TOKEN}
    path = make_pack(
        bench.folder / "shape", SHAPE, "4bit", LAYERS, distinct_records=None, overrides=overrides
    )
    experts = read_manifest(path).manifest.layers[0].num_experts
    tokens = {FULL: 10, PLAIN: 10, NO_LRU: 6, WHOLE: 2, ACCELERATE: 1}
    routing = routing_for(SHAPE, LAYERS, experts, EXPERTS_PER_TOKEN, 128, bench.traces)
    bench.say(f"shape: routing {routing.what}")
    offload = {"config": config_of(SHAPE, LAYERS, overrides)}
    return Model(
        "shape",
        path,
        0.25,
        tokens,
        offload,
        rows=routing.experts.tolist(),
        drawn="replayed" not in routing.what,
    )


def _processes(
    bench: Bench, stack: ExitStack, model: Model
) -> tuple[dict[str, Callable[..., Any]], str]:
    """By way: what decodes one turn; and why one is missing, if it is."""
    manifest = read_manifest(model.pack).manifest
    layer_bytes = max(
        layer.num_experts * manifest.layouts[layer.layout].record_bytes for layer in manifest.layers
    )
    least = manifest.working_set_bytes
    policy = bench.folder / "lru.toml"
    policy.write_text('policy = "lru"\n')

    def daemon(name: str, ram: int, config: Path | None = None) -> dict[str, Any]:
        bench.say(f"{model.name}: a daemon with {ram / 2**20:.0f} MiB")
        socket = bench.folder / f"{model.name}-{name}"
        served = stack.enter_context(
            serving(
                {"m": model.pack},
                ram=max(ram, least),
                socket=socket,
                config=config,
                arguments=["--disk-io", "direct"],
            )
        )
        return {"pack": model.pack, "socket": served.socket, "reader": served.pid}

    shared = daemon("s", int(manifest.expert_bytes * model.share))
    guesses = {} if model.rows is None else {"recall": RECALL}
    jobs = {
        FULL: {**shared, "speculate_layers": 1, **guesses},
        PLAIN: shared,
        NO_LRU: daemon("n", least, policy),
        WHOLE: {**daemon("w", layer_bytes, policy), "whole_layers": True},
    }
    bench.say(f"{model.name}: loading")
    ours = stack.enter_context(workers(jobs))
    decode = {name: _ours(model, manifest, ours, name) for name in jobs}
    if model.rows is not None:
        ours.do(PLAIN, "warm", rows=model.rows[:_WARM])
    if importlib.util.find_spec("accelerate") is None:
        return decode, "accelerate is not installed: pip install accelerate"
    bench.say(f"{model.name}: a stock model for accelerate")
    job = {**model.offload, "folder": str(bench.folder / f"{model.name}-offload")}
    peer = stack.enter_context(TierProcess([sys.executable, str(_OFFLOAD), json.dumps(job)]))
    decode[ACCELERATE] = lambda: peer.ask(str(model.tokens[ACCELERATE]))
    return decode, ""


def _ours(
    model: Model, manifest: Manifest, process: TierProcess, name: str
) -> Callable[[], dict[str, Any]]:
    """Decodes the next tokens, other ones each time: what one turn read must not help the next."""
    tokens = model.tokens[name]
    # The workers of one daemon go on where the other stopped.
    place = {PLAIN: tokens}.get(name, 0)
    step = 2 * tokens if name in (FULL, PLAIN) else tokens
    context = 1 if model.rows is not None else _CONTEXT
    turn = 0

    def decode() -> dict[str, Any]:
        nonlocal turn
        start = turn * step + place
        turn += 1
        rows = None
        ids: Any = range(3, 4 + tokens)
        if model.rows is None:
            start = start * 7 % (len(model.ids) - tokens - context)
            ids = model.ids[start : start + context + tokens]
        else:
            count = len(model.rows)
            rows = [model.rows[(_WARM + start + n) % count] for n in range(tokens + 1)]
        answer: dict[str, Any] = process.do(
            name, "decode", ids=list(ids), context=context, rows=rows, forget=name == NO_LRU
        )
        return answer

    return decode


def _take_turns(
    bench: Bench, model: Model, decode: dict[str, Callable[..., Any]], turns: int
) -> dict[str, Tally]:
    tallies = {name: Tally() for name in decode}
    record_bytes = read_manifest(model.pack).manifest.max_record_bytes
    with StorageProbe(model.pack, piece_bytes=record_bytes) as probe:
        for number in range(turns + 1):
            rate = probe.rate(_PROBE_SECONDS)
            for name in sorted(decode, key=WAYS.index, reverse=bool(number % 2)):
                if not number and (name == ACCELERATE or bench.quick):
                    continue  # warm from its making, or not to be quoted
                bench.say(f"{model.name}: {name}, {number} of {turns}")
                answer = decode[name]()
                if number:
                    tallies[name].add(answer, rate)
    return tallies


def _figures(model: str, tallies: dict[str, Tally]) -> Iterator[Figure]:
    for name, tally in tallies.items():
        what = f"{model}, {name} / what the disk allows for {_megabytes(tally)} MB a token"
        if all(tally.num_bytes):
            turns = list(zip(tally.speeds, tally.bounds, strict=True))
            yield compared(PART, what, "tokens/s", turns)
        else:
            yield counted(PART, f"{model}, {name}", "tokens/s", tally.speeds)
    for less, more, goal in (
        (PLAIN, FULL, 1.0 if model == "shape" else None),
        (NO_LRU, PLAIN, None),
        (WHOLE, NO_LRU, None),
        (ACCELERATE, WHOLE, None),
    ):
        if less in tallies:
            turns = list(zip(tallies[more].speeds, tallies[less].speeds, strict=True))
            yield compared(PART, f"{model}, {more} / {less}", "tokens/s", turns, at_least=goal)
    if hints := tallies[FULL].hints_text:
        yield counted(
            PART,
            f"{model}: hinted experts that were needed ({hints})",
            "share",
            [tallies[FULL].recall],
        )


def _megabytes(tally: Tally) -> str:
    return f"{statistics.median(tally.num_bytes) / 1e6:.3g}"


def _tables(tallies: dict[str, dict[str, Tally]]) -> Iterator[Table]:
    kinds = ("tokens/s", "times naive", "MB read a token")
    rows = []
    for way in WAYS:
        row = [_named(way)]
        for of in tallies.values():
            if way not in of:
                row += ["not measured", "", ""]
                continue
            low, high = quartiles(of[way].speeds)
            speed, naive = (statistics.median(of[each].speeds) for each in (way, WHOLE))
            row += [
                f"{speed:.3g} ({low:.3g} to {high:.3g})",
                f"{speed / naive:.3g}",
                _megabytes(of[way]),
            ]
        rows.append(tuple(row))
    yield Table(
        "Disk to RAM, here",
        ("", *(f"{model}: {kind}" for model in tallies for kind in kinds)),
        tuple(rows),
    )
    yield Table(
        "RAM to GPU, the paper's Table 2: tokens/s (times naive)",
        ("", *PAPER),
        tuple(
            (
                _named(way),
                *(f"{speeds[n]:.3f} ({speeds[n] / speeds[3]:.2f})" for speeds in PAPER.values()),
            )
            for n, way in enumerate(WAYS[:4])
        ),
        "Mixtral-8x7B with 2-bit experts. Published figures, not measured here. A model of 128"
        " experts of which a token uses 6 gains more by reading experts instead of layers than"
        " one of 8 and 2.",
    )


def _named(way: str) -> str:
    return way if way != WHOLE else f"{WHOLE} (naive)"


def _plot(tallies: dict[str, dict[str, Tally]]) -> Plot:
    curves = []
    for model, of in tallies.items():
        naive = statistics.median(of[WHOLE].speeds)
        ways = [way for way in WAYS if way in of]
        spread = [quartiles(of[way].speeds) for way in ways]
        curves.append(
            Curve(
                f"{model}, disk to RAM",
                tuple(float(WAYS.index(way)) for way in ways),
                tuple(statistics.median(of[way].speeds) / naive for way in ways),
                tuple(low / naive for low, _ in spread),
                tuple(high / naive for _, high in spread),
            )
        )
    for gpu in ("A100", "T4"):
        speeds = PAPER[gpu]
        ratios = tuple(speed / speeds[3] for speed in speeds)
        label = f"the paper, RAM to {gpu}"
        curves.append(Curve(label, tuple(map(float, range(4))), ratios, dashed=True))
    return Plot(
        "ablation",
        "Tokens per second, as multiples of reading whole layers",
        "",
        "times naive",
        tuple(curves),
        ticks=tuple(map(_named, WAYS)),
        y_log=True,
    )
