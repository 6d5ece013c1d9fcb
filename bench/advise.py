"""What `expert-run advise` predicts of a pack, beside what a worker then does with it.

Each turn asks for advice anew, which probes the host and knows nothing of the turns before, and
then generates with a worker of a daemon with that budget. The packs are of real shapes, with random
bytes, whose routing is uniform: so it is the prediction for the worst case that stands beside
what was measured with less RAM than experts. The ratio is tokens per second predicted to
measured; the goal is a quarter.

Example: python -m bench advise --dir /var/lib/expertd
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers

from bench.figures import Bench, Figure, compared
from bench.sharing import fill
from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd.packing.synthetic import make_pack
from expertd_inference import EmbeddedDaemon, load_model
from expertd_inference.advice.advisor import Question, advise
from expertd_inference.advice.models import find_model
from expertd_inference.engine.decoding import Decoding
from expertstore.pack.manifest import read_manifest

_EXAMPLE = Path(__file__).resolve().parent.parent / "examples/tiny-mixtral"
_TURNS = 3
_TOKENS = 96
_CONTEXT = 16


@dataclass(frozen=True)
class Case:
    """A model and the share of its experts in RAM."""

    name: str
    share: float
    shape: str | None = None
    """None for the example model, which is trained and small."""
    layers: int | None = None
    scheme: str = "4bit"


CASES = (
    Case("example model, all in RAM", 1.0),
    Case("OLMoE-1B-7B, 8 layers, all in RAM", 1.0, "olmoe-1b-7b", 8),
    Case("OLMoE-1B-7B, 8 layers, paper-2bit, all in RAM", 1.0, "olmoe-1b-7b", 8, "paper-2bit"),
    Case("Qwen3-30B-A3B, 6 layers, half in RAM", 0.5, "qwen3-30b-a3b", 6),
)


def measure(bench: Bench) -> Iterator[Figure]:
    """A figure per case."""
    transformers.utils.logging.disable_progress_bar()
    for case in CASES[:1] if bench.quick else CASES:
        folder = bench.folder / f"{CASES.index(case)}"
        bench.say(f"{case.name}: making a pack")
        path = _make_pack(folder, case)
        turns = []
        for turn in range(1 if bench.quick else _TURNS):
            bench.say(f"{case.name}: predicting, {turn + 1} of {_TURNS}")
            predicted, budget = _predict(path, case.share)
            bench.say(f"{case.name}: measuring, {turn + 1} of {_TURNS}")
            turns.append(
                (predicted, _tokens_per_second(path, budget, 4 if bench.quick else _TOKENS))
            )
        yield compared("advise", case.name, "tokens/s", turns, at_least=0.75, at_most=1.25)


def _make_pack(folder: Path, case: Case) -> Path:
    if case.shape is None:
        pack(Request(_EXAMPLE, folder, choose_scheme(case.scheme), optimize=False))
        return folder
    # Records that are read from disk must not be the same few.
    distinct = None if case.share < 1 else 8
    return make_pack(folder, case.shape, case.scheme, case.layers, distinct_records=distinct)


def _predict(path: Path, share: float) -> tuple[float, int]:
    """Tokens per second, and the budget for them."""
    model = find_model(str(path))
    budget = int(share * model.needs[0].expert_bytes)
    advice = advise(model, Question(ram_bytes=budget), lambda _: None)
    return advice.rows[0].worst, budget


def _tokens_per_second(path: Path, budget: int, tokens: int) -> float:
    """Of a worker that has generated some before."""
    with EmbeddedDaemon(path, ram=budget) as daemon:
        fill(daemon.socket, read_manifest(path).manifest, daemon.name)
        model = load_model(daemon.name, socket=daemon.socket)
        try:
            model.generation_config.eos_token_id = None
            _decode(model, tokens)
            return _decode(model, tokens)
        finally:
            model.expertd.close()


def _decode(model: Any, tokens: int) -> float:  # noqa: ANN401 - transformers is untyped
    times = _Times()
    model.generate(
        torch.randint(10, model.config.vocab_size, (1, _CONTEXT)),
        max_new_tokens=tokens + 1,
        do_sample=False,
        pad_token_id=0,
        streamer=times,
        custom_generate=Decoding(times),
    )
    # The prompt comes first.
    return (len(times.at) - 4) / (times.at[-1] - times.at[3])


class _Times:
    """A streamer that notes when tokens came."""

    def __init__(self) -> None:
        self.at: list[float] = []

    def put(self, _: torch.Tensor) -> None:
        """The prompt first, then each token."""
        self.at.append(time.perf_counter())

    def end(self) -> None:
        """Nothing is left."""
