"""What hints are worth to a CPU worker with less RAM than model: ``make bench-prefetch``.

One daemon, two workers that take turns: one lets the next layers' routers tell the daemon what
to read while a layer computes, as far ahead as it finds to pay, the other waits for what is absent
when it needs it. The daemon reads past the page cache (O_DIRECT), so that each read is the disk's.
Two models: the example's, whose routing was learned and whose layers compute in
less time than a hint takes, and one of Qwen3-30B-A3B's shape, cut to a few layers, of random
weights, whose residual stream hardly changes from layer to layer, so that routers are asked
ahead with more success than in most trained models: the first is what foresight costs at worst,
the second what reading ahead can hide at best.

Example: python -m bench.prefetch --only shape --dir /var/lib/expertd --json
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from bench.figures import Bench, Figure, compared, counted
from bench.progress import progress
from bench.store import show
from expertd_testing.daemon import serving

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel

MODELS = ("example", "shape")
SHAPE = "qwen3-30b-a3b"
_SHAPE_LAYERS = 6
_EXAMPLE = Path(__file__).resolve().parent.parent / "examples/tiny-mixtral"
_SETTLING_TOKENS = 32
_SHARES = {"example": (1.0, 0.5, 0.25), "shape": (1.0, 0.9, 0.75, 0.5, 0.25)}
"""Of the experts' bytes, in RAM. A quarter is the least that serves the example."""


@dataclass(frozen=True)
class Plan:
    """How much is measured."""

    turns: int
    new_tokens: int
    shares: Sequence[float] | None
    prompt_tokens: int
    layers: int | None
    """Ahead, of which experts are foreseen; None for as many as pay, once that is known."""
    experts: int | None
    """Per layer and token; None for as many as a token uses."""


@dataclass(frozen=True)
class Turn:
    """One prompt and its continuation."""

    prefill_seconds: float
    tokens_per_second: float
    waited: float
    """Experts per token that had to be read first."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    description, _, epilog = (__doc__ or "").partition("\n\nExample:")
    parser = argparse.ArgumentParser(
        prog="python -m bench.prefetch",
        description=description,
        epilog=f"Example:{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", action="append", choices=MODELS, help="a model")
    parser.add_argument("--dir", type=Path, help="where to write packs; default: $TMPDIR or /tmp")
    parser.add_argument("--shares", help="of the experts in RAM, as in 1,0.5")
    parser.add_argument("--layers", type=int, help="layers to look ahead (as many as pay)")
    parser.add_argument("--prompt", type=int, default=16, help="tokens of each prompt (16)")
    parser.add_argument("--packs", type=Path, help="where packs are kept for the next time")
    parser.add_argument("--experts", type=int, help="experts per layer (as many as a token uses)")
    parser.add_argument("--turns", type=int, default=5, help="of each worker (5)")
    parser.add_argument("--tokens", type=int, default=24, help="decoded in a turn (24)")
    parser.add_argument("--quick", action="store_true", help="a little of all, to see it work")
    options = parser.parse_args(arguments)
    shares = options.shares and tuple(map(float, options.shares.split(",")))
    figures: list[Figure] = []
    console = Console(stderr=True)
    with (
        tempfile.TemporaryDirectory(prefix="bench-", dir=options.dir) as folder,
        progress(console, "starting") as status,
    ):
        for name in options.only or MODELS:
            place = Path(folder) / name
            place.mkdir()
            plan = Plan(
                options.turns,
                options.tokens,
                shares,
                options.prompt,
                options.layers,
                options.experts,
            )
            if options.quick:
                plan = replace(plan, turns=1, new_tokens=3, shares=shares or (0.5,), layers=1)
            bench = Bench(place, status.update)
            for figure in measure(name, bench, plan, options.packs):
                figures.append(figure)
                console.print(f"  {figure.what}: {figure.ours:.3g} {figure.unit}", highlight=False)
    if options.json:
        rows = [asdict(figure) for figure in figures]
        print(json.dumps({"figures": rows, "load_average": os.getloadavg()[0]}, indent=1))
    else:
        show(figures, "hints to the daemon: with them, and without")
        print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} CPUs")


def measure(name: str, bench: Bench, plan: Plan, packs: Path | None = None) -> Iterator[Figure]:
    """The figures of one model, at each share of its experts in RAM.

    Its pack is made in ``packs``, or used if it is there; without it, in the bench's folder.
    """
    from expertstore.pack.manifest import read_manifest

    pack = (packs or bench.folder) / f"{name}-pack"
    if not pack.exists():
        bench.say(f"{name}: making a pack")
        _make_pack(name, pack)
    manifest = read_manifest(pack).manifest
    for share in plan.shares or _SHARES[name]:
        ram = max(int(manifest.expert_bytes * share), manifest.working_set_bytes)
        direct = ["--disk-io", "direct"]
        with serving({"m": pack}, ram=ram, socket=bench.folder / "s", arguments=direct) as daemon:
            yield from _compare(name, bench, plan, daemon.socket, share)


def _compare(name: str, bench: Bench, plan: Plan, socket: Path, share: float) -> Iterator[Figure]:
    from expertd_inference import load_model
    from expertd_inference.settings import DeviceSettings

    of = f"{name}, {100 * share:.0f} % in RAM"
    bench.say(f"{of}: loading")
    plain = load_model("m", socket=socket, device=DeviceSettings(speculate_layers=0))
    settings = DeviceSettings(speculate_layers=plan.layers, speculate_experts=plan.experts)
    hinting = load_model("m", socket=socket, device=settings)
    settling = 0 if plan.layers else 2
    prompts = _prompts(name, plain, 2 * plan.turns + 1 + settling, plan.prompt_tokens)
    _turn(plain, next(prompts), plan.new_tokens)  # fills the RAM
    for _ in range(settling):
        bench.say(f"{of}: how far ahead pays")
        _turn(hinting, next(prompts), _SETTLING_TOKENS)
    before = hinting.expertd.hint_stats
    turns: list[tuple[Turn, Turn]] = []
    for number in range(plan.turns):
        bench.say(f"{of}: {number + 1} of {plan.turns}")
        order = (hinting, plain) if number % 2 else (plain, hinting)
        done = {id(model): _turn(model, next(prompts), plan.new_tokens) for model in order}
        turns.append((done[id(hinting)], done[id(plain)]))
    stats = hinting.expertd.hint_stats.since(before)
    bench.say(f"{of}: {stats.layers_ahead} layers ahead: {stats.why}")
    for model in (plain, hinting):
        model.expertd.close()
    speeds = [(ours.tokens_per_second, theirs.tokens_per_second) for ours, theirs in turns]
    yield compared("prefetch", f"{of}: decode", "tokens/s", speeds)
    prefills = [(theirs.prefill_seconds, ours.prefill_seconds) for ours, theirs in turns]
    yield compared("prefetch", f"{of}: prefill, without / with", "s", prefills)
    for what, index in (("waited for, with hints", 0), ("waited for, without", 1)):
        waited = [pair[index].waited for pair in turns]
        yield counted("prefetch", f"{of}: {what}", "experts/token", waited)
    yield counted("prefetch", f"{of}: {stats.why}", "layers ahead", [stats.layers_ahead])
    for what in ("useful", "late", "wasted"):
        part = getattr(stats, what) / max(1, stats.issued)
        yield counted("prefetch", f"{of}: of the hinted {what}", "share", [part])


def _turn(model: "PreTrainedModel", prompt: "Tensor", new_tokens: int) -> Turn:
    import torch

    from expertd_inference.model.cache_name import CACHE

    with torch.no_grad():
        began = time.perf_counter()
        output = model(prompt, use_cache=True)
        prefilled = time.perf_counter()
        missed = model.expertd.session.nvme_misses
        for _ in range(new_tokens):
            token = output.logits[:, -1:].argmax(-1)
            output = model(token, **{CACHE: output[CACHE]}, use_cache=True)
        seconds = time.perf_counter() - prefilled
    waited = (model.expertd.session.nvme_misses - missed) / new_tokens
    return Turn(prefilled - began, new_tokens / seconds, waited)


def _prompts(
    name: str, model: "PreTrainedModel", count: int, num_tokens: int
) -> Iterator["Tensor"]:
    """Token ids [1, T], other ones each time: what the last turn read must not help the next."""
    import torch
    from transformers import AutoTokenizer

    if name == "example":
        text = (_EXAMPLE / "heldout.txt").read_text()[4000:]
        ids = AutoTokenizer.from_pretrained(_EXAMPLE)(text[: 8000 * count]).input_ids
        step = len(ids) // count
        starts = range(0, step * count, step)
        yield from (torch.tensor([ids[start : start + num_tokens]]) for start in starts)
    else:
        generator = torch.Generator().manual_seed(0)
        for _ in range(count):
            yield torch.randint(3, model.config.vocab_size, (1, num_tokens), generator=generator)


def _make_pack(name: str, path: Path) -> None:
    from expertd.packing.packer import Request, pack
    from expertd.packing.schemes import choose_scheme

    path.parent.mkdir(parents=True, exist_ok=True)
    if name == "example":
        pack(Request(_EXAMPLE, path, choose_scheme("4bit", None, None), optimize=False))
        return
    from bench.synthetic import make_pack

    # The head of so few layers would take most of a token.
    few = {"vocab_size": 4096}
    layers = _SHAPE_LAYERS
    make_pack(path, SHAPE, "4bit", layers, distinct_records=None, overrides=few)


if __name__ == "__main__":
    main()
