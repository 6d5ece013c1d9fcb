"""What each executor of the CPU makes of 1, 8 and 32 sequences: make bench-executors.

A model of each architecture that every change tests, and of some more, in a published model's
widths but of few layers, with random weights in 4 bits and all experts in RAM. The vocabulary is
cut as the layers are, so that the head has its usual share of a step; of some models there are
fewer experts. One worker has all the executors that can compute its model, whichever of them it
would choose (in bold), and they compute steps in turns: one row of each sequence, after a context
of 64 tokens. Steps only: nothing is planned, sampled or delivered. *turns*, one sequence after the
other with transformers' cache, is what the ratios are to.

Example: python -m bench executors --json
"""

import statistics
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
import transformers

from bench.figures import Bench, Figure, compared
from bench.results import Table
from bench.synthetic import SHAPES, TINY, make_pack
from expertd_inference import Worker
from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.choose import choose_executor, choose_for
from expertd_inference.execution.executor import Executor
from expertd_inference.execution.room import Room
from expertd_inference.execution.turns import TurnsExecutor
from expertd_inference.process.attachment import attach
from expertd_testing.daemon import serving
from expertstore.pack.manifest import read_manifest

PART = "executors"
STEPS = {1: 8, 8: 3, 32: 1}
"""Of a turn, by the number of sequences."""
SEQUENCES = tuple(STEPS)
CONTEXT = 64
ROUNDS = 3
_BLOCKS = 4
"""Of each sequence: room for the context and all steps."""

_COMMON: dict[str, Any] = {
    "dtype": "bfloat16",
    "bos_token_id": 1,
    "eos_token_id": 2,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-6,
}
_INDEXED = {
    **SHAPES["deepseek-v3"],
    **_COMMON,
    "architectures": ["DeepseekV32ForCausalLM"],
    "model_type": "deepseek_v32",
    "index_n_heads": 64,
    "index_head_dim": 128,
    "index_topk": 2048,
}
_CONVOLUTIONS = {
    **_COMMON,
    "architectures": ["Lfm2MoeForCausalLM"],
    "model_type": "lfm2_moe",
    "hidden_size": 2048,
    "intermediate_size": 7168,
    "moe_intermediate_size": 1792,
    "num_hidden_layers": 24,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "num_experts": 32,
    "num_experts_per_tok": 4,
    "num_dense_layers": 1,
    "layer_types": ["conv", "conv", "full_attention", "conv"],
    "max_position_embeddings": 128000,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e6},
    "vocab_size": 65536,
}


@dataclass(frozen=True)
class Case:
    """A model, cut to ``layers``; ``shape`` is None for one of :data:`SHAPES`."""

    name: str
    layers: int
    shape: Mapping[str, Any] | None = None
    overrides: Mapping[str, Any] = field(default_factory=dict)


_ONE_DENSE = {"first_k_dense_replace": 1}
_FEWER = _ONE_DENSE | {"n_routed_experts": 64}
CASES = (
    Case("olmoe-1b-7b", 4),
    Case("qwen3-30b-a3b", 4),
    Case("qwen1.5-moe-a2.7b", 3),
    Case("granite-3.0-1b-a400m", 6),
    Case("mixtral-8x7b", 2),
    Case("phi-3.5-moe", 2),
    Case("gpt-oss-20b", 3),
    Case("glm-4.5-air", 2, overrides=_ONE_DENSE),
    Case("deepseek-v2-lite", 3),
    Case("deepseek-v3", 2, overrides=_FEWER),
    Case("qwen3-next-80b-a3b", 4, overrides={"num_experts": 128}),
    Case("lfm2-8b-a1b", 4, _CONVOLUTIONS),
    Case("deepseek-v3.2", 2, _INDEXED, _FEWER),
)
QUICK = ("olmoe-1b-7b", "qwen3-next-80b-a3b")


@dataclass
class Contestant:
    """An executor with as many sequences as are measured."""

    executor: Executor
    tokens: int
    """Of the vocabulary."""
    rates: dict[int, list[float]] = field(default_factory=dict)
    _positions: list[int] = field(default_factory=lambda: [0] * max(SEQUENCES))

    def step(self, sequences: int, rows: int = 1) -> None:
        """``rows`` more of each sequence."""
        spans = []
        for number in range(sequences):
            tokens: list[int] = torch.randint(self.tokens, (rows,)).tolist()
            blocks = range(number * _BLOCKS, (number + 1) * _BLOCKS)
            position = self._positions[number]
            spans.append(Span(number, tokens, position, blocks, number, Wanted.LAST))
            self._positions[number] += rows
        batch = Batch(tuple(spans))
        if rows == 1 and self.executor.fits(batch):
            self.executor.forward(batch)
        else:
            for span in spans:
                self.executor.forward(Batch((span,)))

    def decode(self, sequences: int, steps: int) -> float:
        """Tokens per second."""
        began = time.perf_counter()
        for _ in range(steps):
            self.step(sequences)
        return steps * sequences / (time.perf_counter() - began)


def measure(bench: Bench) -> Iterator[Figure | Table]:
    """What the chosen executor makes of 32 sequences, for each model; then all of them."""
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    rows: list[tuple[str, ...]] = []
    for case in CASES:
        if bench.quick and case.name not in QUICK:
            continue
        with ExitStack() as stack:
            chosen, contestants = _contestants(bench, case, stack)
            bench.say(f"{case.name}: steps in turns")
            _take_turns(contestants, 1 if bench.quick else ROUNDS)
        what = f"{case.name}, {case.layers} layers"
        slow = contestants["turns"].rates
        most = max(SEQUENCES)
        yield compared(
            PART,
            f"{what}: {chosen}, {most} sequences / in turns",
            "tokens/s",
            list(zip(contestants[chosen].rates[most], slow[most], strict=True)),
        )
        rows += [
            _row(what, name, contestant.rates, slow, chosen=name == chosen)
            for name, contestant in contestants.items()
        ]
    yield Table(
        "Tokens per second of all sequences, by how many there are",
        ("model", "executor", "1 sequence", *(f"{n} sequences" for n in SEQUENCES[1:])),
        tuple(rows),
        "In brackets: how many times *turns* with as many sequences. Bold: the chosen one.",
    )


def _contestants(bench: Bench, case: Case, stack: ExitStack) -> tuple[str, dict[str, Contestant]]:
    """The name of the chosen executor, and all that can compute the model."""
    bench.say(f"{case.name}: making a pack")
    shape = dict(case.shape or SHAPES[case.name])
    shape["vocab_size"] = -(-shape["vocab_size"] * case.layers // shape["num_hidden_layers"])
    overrides = {**case.overrides, **(TINY if bench.quick else {})}
    pack = make_pack(
        bench.folder / case.name,
        {**_COMMON, "hidden_act": "silu", **shape},
        "4bit",
        case.layers,
        overrides=overrides,
    )
    bench.say(f"{case.name}: loading it")
    daemon = stack.enter_context(
        serving({"m": pack}, ram=read_manifest(pack).manifest.expert_bytes)
    )
    worker = stack.enter_context(Worker(attach("m", daemon.socket), say=lambda _: None))
    for layer in worker.manifest.layers:
        for lease in worker.session.waves(layer.layer, range(layer.num_experts)):
            lease.release()
    room = Room(_BLOCKS * max(SEQUENCES), max(SEQUENCES), max(SEQUENCES) + CONTEXT)
    model = worker.model
    try_each = [
        partial(choose_executor, worker, room),
        partial(choose_for, model, room, lambda _: None),
        partial(TurnsExecutor, model, "for comparison"),
    ]
    contestants: dict[str, Contestant] = {}
    for make in try_each:
        executor = make()
        stack.callback(executor.close)
        contestants.setdefault(executor.name, Contestant(executor, model.config.vocab_size))
    for contestant in contestants.values():
        contestant.step(max(SEQUENCES), CONTEXT)
    return next(iter(contestants)), contestants


def _take_turns(contestants: Mapping[str, Contestant], rounds: int) -> None:
    """After one round that does not count."""
    for number in range(rounds + 1):
        for sequences in SEQUENCES:
            for contestant in contestants.values():
                rate = contestant.decode(sequences, STEPS[sequences])
                if number:
                    contestant.rates.setdefault(sequences, []).append(rate)


def _row(
    what: str,
    name: str,
    rates: Mapping[int, list[float]],
    slow: Mapping[int, list[float]],
    *,
    chosen: bool,
) -> tuple[str, ...]:
    cells = []
    for number in SEQUENCES:
        cell = f"{statistics.median(rates[number]):.3g}"
        if name != "turns":
            turns = zip(rates[number], slow[number], strict=True)
            cell += f" ({statistics.median(ours / theirs for ours, theirs in turns):.3g}x)"
        cells.append(cell)
    return what, f"**{name}**" if chosen else name, *cells
