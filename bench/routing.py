"""What caches and guesses can do: Figure 2 of Eliseev & Mazur (arXiv 2312.17238), on real routing.

Two kinds of routing. The example model's own (`examples/tiny-mixtral`, trained for real), over the
beginnings of held-out files: 64 tokens each that count as prompt, whose experts a worker asks for
together, and what follows as if it were decoded. And traces of one real run each of Qwen3-30B-A3B
and gpt-oss-120b, recorded by others with fewer experts per token than the models' own (6 and 2).

**Hits.** *GPU lru* is the paper's cache, LRU with k slots a layer, as a worker has it on a GPU, and
*GPU aged* the other policy there. The daemon's policies (`density` unless told otherwise) are by
`expertd replay`; the daemon hears late of what is used, so its `lru-per-layer` is not quite the
same. Beside them stands the offline optimum, which knows the future (Belady's). All begin empty.
*Decode* is the steady state; *lifetime* has the prompts too, and filling the empty cache. A hit
rate is no throughput.

**Recall** of speculation: the share of the experts that a layer used which were among so many
guesses. The later layer's router is applied to what entered the router one or more layers before,
by the code with which a worker looks ahead. Who always guesses the layer's most used experts (known
from the same text) stands beside it, and a layer of 8 from which blind guesses are drawn. The
example has six layers, so the further ahead, the fewer layers there are to foresee, and they are
the later ones. Bands are the middle half of the files.

The paper's Figure 2 has the same two curves for Mixtral-8x7B. It is a picture without figures, so
none of its stand here. The example has Mixtral's 8 experts a layer and two for a token, so the same
number of slots or of guesses is the same share of a layer; but it has 6 layers in place of 32, so
each of them changes more of the residual stream, and one layer ahead is a sixth of the model. What
can be compared is what the paper shows: that a layer's own LRU hits more than its share of the
experts, and that the next layer's router foresees more than a guess would, and less from further
away.

Example: python -m bench routing --quick --out /tmp/bench
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from bench.device_cache import hit_rates
from bench.example_routing import PROMPT_TOKENS, ExampleRouting, Shares
from bench.figures import Bench, Figure, counted
from bench.residency import Replayed, figures, replayed
from bench.results import Curve, Plot, Table
from expertd.traces.replay import HitRates
from expertd_inference.settings import CachePolicy

_FILES, _TOKENS = 30, 320
_QUICK_FILES, _QUICK_TOKENS = 3, 96
_SHARES = (0.05, 0.10, 0.15, 0.25, 0.35, 0.5, 0.75)
_QUICK_SHARES = (0.10, 0.25)
_OPTIMUM = "optimum"
_DEVICE_POLICIES = {f"GPU {policy.value}": policy for policy in CachePolicy}
_PAPER_POLICY = f"GPU {CachePolicy.LRU.value}"
_TABLE_ONLY = ("lru-per-layer", f"GPU {CachePolicy.AGED.value}")


def measure(bench: Bench) -> Iterator[Figure | Table | Plot | str]:
    """Hit rates on the example and on the traces, then speculation's recall on the example."""
    routing = ExampleRouting(
        _QUICK_FILES if bench.quick else _FILES,
        _QUICK_TOKENS if bench.quick else _TOKENS,
        lambda text: bench.say(f"routing: example, {text}"),
    )
    yield from _example_hits(bench, routing)
    if not bench.traces:
        yield "hit rates on the traces of larger models: none lies in shared/traces"
    for trace in bench.traces:
        yield from _trace_hits(bench, trace)
    yield from _recall(bench, routing)


# --- hits -----------------------------------------------------------------------------------------


def _example_hits(bench: Bench, routing: ExampleRouting) -> Iterator[Figure | Table | Plot]:
    trace = bench.folder / "example.csv"
    routing.write_trace(trace)
    slots = (2, 4) if bench.quick else tuple(range(2, routing.num_experts))
    result = _replay(bench, trace, [each / routing.num_experts for each in slots])
    half = routing.num_experts // 2
    yield _beside_optimum(
        f"example, {half} of {routing.num_experts} slots a layer", result.rates[0.5], _PAPER_POLICY
    )
    yield Table(
        "Hits on the example's routing",
        ("slots per layer", *result.rates[0.5]),
        tuple(
            (str(count), *(_both(each) for each in rates.values()))
            for count, rates in zip(slots, result.rates.values(), strict=True)
        ),
        f"Share of hits while decoding, and in brackets over the lifetime. {routing.num_decoded:,} "
        f"decoded tokens in {len(routing.passages)} sequences. If routing were even, any cache "
        "would hit its share.",
    )
    chance = tuple(each / routing.num_experts for each in slots)
    yield Plot(
        "routing-example",
        "Hits against slots: the example model's routing, decoding",
        "experts cached per layer, of 8",
        "hits, share of uses",
        (
            *_curves(result, tuple(map(float, slots))),
            Curve("even routing", tuple(map(float, slots)), chance, dashed=True),
        ),
    )


def _trace_hits(bench: Bench, trace: Path) -> Iterator[Figure | Table | Plot]:
    result = _replay(bench, trace, _QUICK_SHARES if bench.quick else _SHARES)
    yield from figures(trace.stem, result)
    yield Table(
        f"Hits on the trace of {trace.stem}",
        ("share cached", *next(iter(result.rates.values()))),
        tuple(
            (f"{share:.0%}", *(_both(each) for each in rates.values()))
            for share, rates in result.rates.items()
        ),
        "Share of hits while decoding, and in brackets over the lifetime, which for the daemon has "
        "the prompt layer by layer, as the trace has it, and for a GPU token by token. What the "
        "optimum misses in the largest cache are first uses, which every cache misses.",
    )
    yield Plot(
        f"routing-{trace.stem}",
        f"Hits against cache: {trace.stem}, decoding",
        "share of all experts cached, %",
        "hits, share of uses",
        _curves(result, tuple(100 * share for share in result.rates)),
    )


def _replay(bench: Bench, trace: Path, shares: Sequence[float]) -> Replayed:
    """The daemon's policies and the optimum, and the GPU cache's."""
    bench.say(f"routing: replaying {trace.name}")
    result = replayed(trace, shares)
    for share, rates in result.rates.items():
        for name, policy in _DEVICE_POLICIES.items():
            bench.say(f"routing: {trace.name}, {share:.0%} on a GPU, {policy}")
            rates[name] = hit_rates(trace, share, policy)
    return result


def _curves(result: Replayed, x: tuple[float, ...]) -> tuple[Curve, ...]:
    """Decode by policy; the default's lifetime, too."""
    notes = {result.default: f"{result.default} (default)", _PAPER_POLICY: "LRU per layer (GPU)"}
    curves = [
        Curve(
            notes.get(name, name),
            x,
            tuple(_decode(rates[name]) for rates in result.rates.values()),
            dashed=name == _OPTIMUM,
        )
        for name in next(iter(result.rates.values()))
        if name not in _TABLE_ONLY
    ]
    lifetime = tuple(rates[result.default].lifetime for rates in result.rates.values())
    return (*curves, Curve(f"{result.default}, lifetime", x, lifetime))


def _beside_optimum(what: str, rates: dict[str, HitRates], policy: str) -> Figure:
    ours, limit = 100 * _decode(rates[policy]), 100 * _decode(rates[_OPTIMUM])
    what = f"{what}: {policy} / {_OPTIMUM}"
    return Figure("routing", what, "% decode hits", ours, limit, ours / limit)


def _decode(rates: HitRates) -> float:
    return 0.0 if rates.decode is None else rates.decode


def _both(rates: HitRates) -> str:
    return f"{_decode(rates):.3f} ({rates.lifetime:.3f})"


# --- speculation ----------------------------------------------------------------------------------


def _recall(bench: Bench, routing: ExampleRouting) -> Iterator[Figure | Table | Plot]:
    num_layers = len(routing.routers)
    by_name: dict[str, list[Shares]] = {}
    for ahead in (1, 3) if bench.quick else range(1, num_layers):
        layers = "1 layer ahead" if ahead == 1 else f"{ahead} layers ahead"
        by_name[layers] = routing.recall(
            ahead, lambda text, layers=layers: bench.say(f"routing: {layers}, {text}")
        )
    favourites = routing.recall_of_favourites(lambda text: bench.say(f"routing: hot list, {text}"))
    k, num_experts = routing.experts_per_token, routing.num_experts
    for name, passages in by_name.items():
        values = [100 * float(passage[k - 1]) for passage in passages]
        yield counted("routing", f"recall of {k} guesses, {name}", "% of used experts", values)
    by_name["the layer's most used"] = favourites
    guesses = tuple(float(count) for count in range(1, num_experts + 1))
    yield Table(
        "Recall of speculation on the example",
        ("guesses", *by_name, "blind", "most possible"),
        tuple(
            (
                f"{count}",
                *(f"{np.mean(passages, axis=0)[count - 1]:.3f}" for passages in by_name.values()),
                f"{count / num_experts:.3f}",
                f"{min(1.0, count / k):.3f}",
            )
            for count in range(1, num_experts + 1)
        ),
        f"Means over {len(routing.passages)} files, {routing.num_decoded:,} tokens after the first "
        f"{PROMPT_TOKENS} of each. A token uses {k}, so one guess finds half of them at most.",
    )
    yield Plot(
        "routing-recall",
        "Speculation's recall: the example model on held-out text",
        "experts guessed per layer",
        "share of used experts among them",
        (
            *(
                _recall_curve(name, guesses, passages, dashed=passages is favourites)
                for name, passages in by_name.items()
            ),
            Curve("blind", guesses, tuple(g / num_experts for g in guesses), dashed=True),
        ),
    )


def _recall_curve(
    name: str, guesses: tuple[float, ...], passages: list[Shares], *, dashed: bool
) -> Curve:
    low, high = np.quantile(passages, (0.25, 0.75), axis=0).tolist()
    mean = np.mean(passages, axis=0).tolist()
    if dashed:
        return Curve(name, guesses, tuple(mean), dashed=True)
    return Curve(name, guesses, tuple(mean), tuple(low), tuple(high))
