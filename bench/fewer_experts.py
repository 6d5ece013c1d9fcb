"""What fewer experts cost and gain on the example model: ``python -m bench.fewer_experts``.

Perplexity on text that the model never saw, by the engine, in windows of its whole context; the
time of a token of one sequence, by the thread's own clock of a thread that computes alone; and what
the pack and one token take. The pack is 4bit. Traces for pruning are of other files than those that
are scored.
"""

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.heldout import EXAMPLE, Heldout, read_heldout
from expertd.packing.packer import Request, pack
from expertd.packing.pruning import prune
from expertd.packing.schemes import choose_scheme
from expertd.traces.usage import PruneBy, Usage
from expertd_inference.engine.budget import EngineLimits
from expertd_inference.engine.engine import Engine
from expertd_inference.experts.tracing import traced
from expertd_inference.process.attachment import attach
from expertd_inference.settings import GenerationSettings
from expertd_inference.worker import Worker
from expertd_testing.daemon import serving
from expertstore.pack.manifest import read_manifest

CONTEXT = 1024
SCORED_WINDOWS, TRACED_WINDOWS = 24, 8
"""The first of the held-out text, and those behind them."""
RUN_TIME: tuple[tuple[int | None, float], ...] = (
    *((None, 0.0), (1, 0.0)),
    *((None, 0.1), (None, 0.2), (None, 0.3), (None, 0.4)),
)
SHARES = (0.875, 0.75, 0.5)
ROUNDS, TOKENS = 15, 96


def main() -> None:
    """Measures and prints."""
    torch.set_num_threads(1)
    # With its last target a window is as long as the context.
    heldout = read_heldout(CONTEXT - 1, SCORED_WINDOWS + TRACED_WINDOWS)
    windows = heldout.windows[:SCORED_WINDOWS]
    scored = Heldout(windows, sum(len(one.targets) for one in windows), heldout.num_all)
    table = Table("pack", "K", "P", "experts a token", "MiB", "perplexity", "time of a token")
    with tempfile.TemporaryDirectory(prefix="expertd-fewer-") as name:
        folder = Path(name)
        whole = folder / "whole"
        pack(Request(EXAMPLE, whole, choose_scheme("4bit")))
        with serving({"m": whole}, ram=64 << 20, socket=folder / "s") as daemon:
            worker = Worker(attach("m", daemon.socket))
            usages = _usages(worker, heldout.windows[-TRACED_WINDOWS:])
            base = _measure("whole", worker, scored, RUN_TIME, table, None)
            worker.close()
        for by in PruneBy:
            for share in SHARES:
                few = folder / f"{by}-{share}"
                prune(whole, few, usages[by], share)
                with serving({"m": few}, ram=64 << 20, socket=folder / "s") as daemon:
                    worker = Worker(attach("m", daemon.socket))
                    _measure(f"{share:g} by {by}", worker, scored, RUN_TIME[:1], table, base)
                    worker.close()
    Console(width=120).print(table)


def _usages(worker: Worker, windows: Sequence[Any]) -> dict[PruneBy, Usage]:
    layers = [layer.layer for layer in worker.manifest.layers]
    num = worker.manifest.layers[0].num_experts
    scores = {by: np.zeros((len(layers), num)) for by in PruneBy}
    for window in windows:
        for each in traced(worker.model, lambda ids=window.ids: worker.model(ids[None])):
            place, experts = layers.index(each.layer), each.experts.flatten().numpy()
            np.add.at(scores[PruneBy.COUNTS][place], experts, 1.0)
            np.add.at(scores[PruneBy.ACTIVATION][place], experts, each.added.flatten().numpy())
    return {by: Usage(tuple(layers), tuple(map(tuple, found))) for by, found in scores.items()}


def _measure(
    name: str,
    worker: Worker,
    heldout: Heldout,
    kinds: Sequence[tuple[int | None, float]],
    table: Table,
    base: float | None,
) -> float:
    """Adds rows; the least seconds of a token of the first kind."""
    worker._limits = EngineLimits(max_sequences=1, kv_tokens=2 * CONTEXT)
    engine = worker.engine
    mib = read_manifest(worker.pack).manifest.expert_bytes / 2**20
    prompt = heldout.windows[0].ids[:32].tolist()
    seconds: dict[int, list[float]] = {at: [] for at in range(len(kinds))}
    for _ in range(ROUNDS):
        for at, (most, share) in enumerate(kinds):
            settings = GenerationSettings(
                TOKENS, ignore_eos=True, experts_per_token=most, expert_threshold=share
            )
            seconds[at].append(_seconds(engine, prompt, settings))
    for at, (most, share) in enumerate(kinds):
        before = engine.stats
        nats = 0.0
        for window in heldout.windows:
            nats += _nats(engine, window, most, share)
        took = min(seconds[at])  # what else the host does only adds
        base = base or took
        table.add_row(
            name,
            str(most or 2),
            f"{share:g}",
            f"{engine.stats.experts_mean_since(before):.2f}",
            f"{mib:.1f}",
            f"{np.exp(nats / heldout.num_tokens):.3f}",
            f"{took / base:.2f}",
        )
    return base or 0.0


def _seconds(engine: Engine, prompt: list[int], settings: GenerationSettings) -> float:
    """Of a token after the first, by the time that this process has computed."""
    with engine.submit(prompt, settings) as stream:
        next(stream)
        began = time.process_time()
        num = sum(1 for _ in stream)
        return (time.process_time() - began) / num


def _nats(
    engine: Engine,
    window: Any,  # noqa: ANN401 - of the example's own scoring
    most: int | None,
    share: float,
) -> float:
    ids = [*window.ids.tolist(), int(window.targets[-1])]
    settings = GenerationSettings(
        1, prompt_logprobs=0, prompt_only=True, experts_per_token=most, expert_threshold=share
    )
    with engine.submit(ids, settings) as stream:
        for _ in stream:
            pass
        likely = stream.prompt_logprobs
    return -sum(logprob for logprob, _ in likely[-len(window.targets) :])


if __name__ == "__main__":
    main()
