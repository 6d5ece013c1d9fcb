"""Measure the exported model on the held-out text: how well it predicts, and how it routes.

    python examples/tiny-mixtral/evaluate.py [--json] [--no-samples]

The model runs as stock transformers loads it, in bf16. Everything is written to
``evaluation.json`` as well. The bigram baseline is trained on the same tokens as the model, which
takes the standard library of the Python that runs this.
"""

# ruff: noqa: ANN401 - transformers is not typed

from __future__ import annotations

import argparse
import json
import math
import time
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import corpus
import numpy as np
import numpy.typing as npt
import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from scoring import Tokens, heldout_tokens, windows
from transformers import AutoModelForCausalLM, AutoTokenizer

PROMPTS = ("def read_header(self, name, default=None):\n", "import unittest\n\nclass ")
SAMPLE_TOKENS = 160
TEMPERATURE = 0.8
TOP_P = 0.95

Routing = npt.NDArray[np.int64]  # (tokens, layers, k) expert ids


@dataclass(frozen=True)
class Forward:
    """One pass over the held-out stream: nats in total, and the experts of every token."""

    nats: float
    routing: Routing
    num_experts: int


def forward(model: Any, tokens: Tokens) -> Forward:
    """Score every token but the first, in overlapping windows of the model's context."""
    nats, routing = 0.0, []
    parts = list(windows(tokens, model.config.max_position_embeddings))
    for window in track(parts, description="held-out text"):
        output = model.model(window.ids[None], output_router_logits=True, use_cache=False)
        nats += window.nats(model.lm_head, output.last_hidden_state[0])
        layers = [
            logit[window.fresh].float().topk(model.config.num_experts_per_tok, dim=-1).indices
            for logit in output.router_logits
        ]
        routing.append(torch.stack(layers, dim=1).numpy())
    return Forward(nats, np.concatenate(routing), model.config.num_local_experts)


# --- the baseline ---------------------------------------------------------------------------------


def bigram_nats(streams: corpus.Streams, tokens: Tokens) -> float:
    """Nats of a bigram model, interpolated with the unigrams after Witten and Bell.

    P(b | a) = (count(a b) + types(a) P(b)) / (count(a) + types(a)), with types(a) the number of
    different tokens seen after a, and add-one unigrams: no parameter that wants tuning.
    """
    size = corpus.VOCAB_SIZE
    counts = np.zeros(size * size, dtype=np.int64)
    for stream in (streams.library, streams.tests):
        pairs = stream[:-1].astype(np.int64) * size + stream[1:]
        counts += np.bincount(pairs, minlength=size * size)
    table = counts.reshape(size, size)
    unigrams = (table.sum(axis=0) + 1) / (table.sum() + size)
    types, totals = (table > 0).sum(axis=1), table.sum(axis=1)
    before, after = tokens[:-1], tokens[1:]
    weight = np.maximum(types[before], 1)  # a token never seen before: unigrams alone
    found = table[before, after] + weight * unigrams[after]
    return float(-np.log(found / (totals[before] + weight)).sum())


# --- the routing ----------------------------------------------------------------------------------


def use_per_expert(routing: Routing, num_experts: int) -> list[list[float]]:
    """Each layer's share of the chosen slots per expert."""
    layers = routing.transpose(1, 0, 2).reshape(routing.shape[1], -1)
    shares = [np.bincount(layer, minlength=num_experts) / len(layer) for layer in layers]
    return [share.round(4).tolist() for share in shares]


def persistence(routing: Routing) -> list[float]:
    """Each layer's share of chosen slots whose expert the token before had chosen too."""
    same = (routing[1:, :, :, None] == routing[:-1, :, None, :]).any(axis=-1)
    shares: list[float] = same.mean(axis=(0, 2)).round(4).tolist()
    return shares


def lru_hit_rates(routing: Routing, slots: int) -> list[float]:
    """Each layer's hit rate of ``slots`` slots under LRU, token after token as in decoding."""
    rates = []
    for layer in routing.transpose(1, 0, 2).tolist():
        cache: OrderedDict[int, None] = OrderedDict()
        hits = 0
        for chosen in layer:
            hits += sum(expert in cache for expert in chosen)
            for expert in chosen:
                cache[expert] = None
                cache.move_to_end(expert)
            while len(cache) > slots:
                cache.popitem(last=False)
        rates.append(round(hits / routing[:, 0].size, 4))
    return rates


# --- samples --------------------------------------------------------------------------------------


def write_samples(model: Any, tokenizer: Any) -> list[dict[str, str]]:
    """What the model writes after two prompts: greedily, and sampled from a fixed seed."""
    samples = []
    for prompt in PROMPTS:
        ids = tokenizer(corpus.SEPARATOR + prompt, return_tensors="pt").input_ids
        for kind, options in (
            ("greedy", {"do_sample": False}),
            ("sampled", {"do_sample": True, "temperature": TEMPERATURE, "top_p": TOP_P}),
        ):
            torch.manual_seed(1)
            out = model.generate(ids, max_new_tokens=SAMPLE_TOKENS, **options)
            text = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
            samples.append({"kind": kind, "prompt": prompt, "text": text})
    return samples


# --- the report -----------------------------------------------------------------------------------


def measure(directory: Path, cache: Path, *, samples: bool) -> dict[str, Any]:
    """All figures, as they go to ``evaluation.json``."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).eval()
    tokenizer = AutoTokenizer.from_pretrained(directory)
    texts = corpus.read_heldout()
    stream = heldout_tokens()
    num_bytes = sum(len(text.encode()) for text in texts)
    started = time.monotonic()
    with torch.no_grad():
        result = forward(model, stream)
    seconds = time.monotonic() - started
    num_scored = len(stream) - 1

    def quality(nats: float) -> dict[str, float]:
        return {
            "perplexity": round(math.exp(nats / num_scored), 3),
            "nats_per_token": round(nats / num_scored, 4),
            "bits_per_byte": round(nats / math.log(2) / num_bytes, 4),
        }

    slots = (result.num_experts // 4, result.num_experts // 2)
    return {
        "training": json.loads((directory / "training.json").read_text()),
        "heldout": {"files": len(texts), "bytes": num_bytes, "tokens": num_scored},
        "seconds": round(seconds, 1),
        "model": quality(result.nats),
        "bigram": quality(bigram_nats(corpus.load_streams(cache), stream)),
        "use_per_expert": use_per_expert(result.routing, result.num_experts),
        "persistence": persistence(result.routing),
        "persistence_if_uniform": result.routing.shape[2] / result.num_experts,
        "lru_hit_rate": {str(num): lru_hit_rates(result.routing, num) for num in slots},
        "lru_hit_rate_if_uniform": {str(num): num / result.num_experts for num in slots},
        "samples": write_samples(model, tokenizer) if samples else [],
    }


def show(report: dict[str, Any], console: Console) -> None:
    """The same as tables."""
    quality = Table("held-out", "perplexity", "nats per token", "bits per byte")
    for name in ("model", "bigram"):
        row = report[name]
        quality.add_row(
            name,
            f"{row['perplexity']:.2f}",
            f"{row['nats_per_token']:.3f}",
            f"{row['bits_per_byte']:.3f}",
        )
    console.print(quality)
    slots = list(report["lru_hit_rate"])
    routing = Table("layer", "% of slots per expert", "kept", *(f"LRU {num}" for num in slots))
    columns = [report["persistence"], *(report["lru_hit_rate"][num] for num in slots)]
    for layer, shares in enumerate(report["use_per_expert"]):
        use = " ".join(f"{100 * share:4.1f}" for share in shares)
        routing.add_row(str(layer), use, *(f"{column[layer]:.3f}" for column in columns))
    routing.add_section()
    routing.add_row("mean", "", *(f"{np.mean(column):.3f}" for column in columns))
    uniform = [report["persistence_if_uniform"], *report["lru_hit_rate_if_uniform"].values()]
    routing.add_row("uniform", "", *(f"{value:.3f}" for value in uniform))
    console.print(routing)
    for sample in report["samples"]:
        console.rule(sample["kind"])
        console.print(sample["prompt"] + sample["text"], markup=False, highlight=False)


def main() -> None:
    """Measure, write ``evaluation.json``, print."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", type=Path, default=corpus.HERE)
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp/tiny-mixtral"))
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--no-samples", action="store_true", help="generate nothing")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    report = measure(
        arguments.model, arguments.work_dir / "cache", samples=not arguments.no_samples
    )
    text = json.dumps(report, indent=2)
    (arguments.model / "evaluation.json").write_text(text + "\n")
    if arguments.json:
        print(text)
    else:
        show(report, Console())


if __name__ == "__main__":
    main()
