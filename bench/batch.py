"""Tokens per second of many sequences at once, beside llama.cpp: make bench-batch.

A pack of a real model's shape is served by a daemon, and an engine decodes 1 to 64 sequences
together. llama.cpp has the same shape at the same bits per weight in a private copy that it repacks
for its kernels, and decodes as many sequences in each of its steps. Each count of sequences is
measured in turns; the figures are all sequences' tokens per second after a context of 64 tokens.

Example: python -m bench.batch --shape olmoe-1b-7b --llama-python ~/llama/bin/python --json
         python -m bench.batch --shape qwen3-30b-a3b --layers 8 --activations 8
"""

import argparse
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

# Before torch: its threads must sleep while ours compute, as in expert-run.
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}

import torch
import transformers
from rich.console import Console

from bench.figures import Figure, compared, counted
from bench.peer import CONTEXT, Peer, PeerError, make_gguf
from bench.progress import progress
from bench.store import show
from bench.synthetic import SHAPES, TINY, make_pack
from expertd.packing.schemes import choose_scheme
from expertd_inference import Engine, GenerationSettings, Worker
from expertd_inference.engine.budget import EngineLimits
from expertd_inference.process.attachment import attach
from expertd_testing.daemon import serving
from expertstore.pack.manifest import read_manifest

LAYERS = {"olmoe-1b-7b": 16, "qwen3-30b-a3b": 8}
"""What is measured, and how much of it."""
SEQUENCES = (1, 2, 4, 8, 16, 32, 64)
GOALS = {
    16: {1: 1.1, 8: 1.2, 16: 1.5, 32: 1.5, 64: 1.5},
    8: {8: 1.2, 16: 2.0, 32: 2.0, 64: 2.0},
}
"""At least so many times llama.cpp's rate, by bits of the activations and sequences."""
PROMPT_TOKENS, PROMPT_GOAL = 512, 1.5


class Ours:
    """An engine of a worker whose daemon has all experts in RAM."""

    def __init__(self, socket: Path, activations: int) -> None:
        self._worker = Worker(attach("m", socket), activations=activations)
        self._engine = Engine(
            self._worker, EngineLimits(max_sequences=max(SEQUENCES), kv_tokens=1 << 15)
        )
        for layer in self._worker.manifest.layers:
            for lease in self._worker.session.waves(layer.layer, range(layer.num_experts)):
                lease.release()
        self.executor = self._engine.executor
        self._vocab = self._worker.model.config.vocab_size

    def decode(self, steps: int, sequences: int) -> float:
        """Tokens per second of the steps in which all sequences decode."""
        # None ends before the last one has decoded its steps beside all others.
        settings = GenerationSettings(max_new_tokens=steps + CONTEXT * sequences, ignore_eos=True)
        with ExitStack() as stack:
            for _ in range(sequences):
                last = iter(
                    stack.enter_context(self._engine.submit(self._tokens(CONTEXT), settings))
                )
            next(last)
            began = time.perf_counter()
            for _ in range(steps):
                next(last)
            return steps * sequences / (time.perf_counter() - began)

    def prompt(self, tokens: int) -> float:
        """Tokens per second of a prompt."""
        began = time.perf_counter()
        next(iter(self._engine.submit(self._tokens(tokens), GenerationSettings(max_new_tokens=1))))
        return tokens / (time.perf_counter() - began)

    def close(self) -> None:
        """Frees its memory."""
        self._worker.close()

    def _tokens(self, count: int) -> list[int]:
        tokens: list[int] = torch.randint(10, self._vocab, (count,)).tolist()
        return tokens


def measure(
    shape: str, options: argparse.Namespace, folder: Path, stack: ExitStack
) -> Iterator[Figure]:
    """The figures of one shape."""
    layers = options.layers or LAYERS[shape]
    overrides = TINY if options.quick else None
    precision = "4g64"
    scheme = choose_scheme("4bit", precision, precision, precision, precision)
    pack = make_pack(folder / "pack", shape, scheme, layers, overrides=overrides)
    ram = read_manifest(pack).manifest.expert_bytes
    daemon = stack.enter_context(serving({"m": pack}, ram=ram))
    peer: Peer | None = None
    if options.llama_python:
        config = {**SHAPES[shape], **(overrides or {}), "num_hidden_layers": layers}
        path = folder / "model.gguf"
        make_gguf(options.llama_python, path, config)
        arguments = {
            "path": str(path),
            "load": "private",
            "threads": options.threads,
            "context": max(SEQUENCES) * (CONTEXT + options.steps + 64),
            "vocab": config["vocab_size"],
            "sequences": max(SEQUENCES),
        }
        peer = stack.enter_context(Peer("llama", arguments, python=options.llama_python))
        peer.wait_ready()
    for activations in options.activations or (16, 8):
        ours = Ours(daemon.socket, activations)
        try:
            yield from _turns(shape, layers, activations, ours, peer, options)
        finally:
            ours.close()


def _turns(
    shape: str,
    layers: int,
    activations: int,
    ours: Ours,
    peer: Peer | None,
    options: argparse.Namespace,
) -> Iterator[Figure]:
    what = f"{shape}, {layers} layers, {activations}-bit activations, {ours.executor}"
    for sequences in options.sequences or SEQUENCES:
        turns = []
        for number in range(options.rounds + 1):
            rate = ours.decode(options.steps, sequences)
            theirs = 1.0
            if peer is not None:
                answer = peer.ask(f"batch {options.steps} {sequences} {CONTEXT}")
                theirs = options.steps * sequences / float(answer["seconds"])
            if number:
                turns.append((rate, theirs))
        yield _figure(
            "batch",
            f"{what}, {sequences} sequences",
            turns,
            peer,
            GOALS[activations].get(sequences),
        )
    turns = []
    for number in range(options.rounds + 1):
        rate = ours.prompt(PROMPT_TOKENS)
        theirs = PROMPT_TOKENS / peer.prompt(PROMPT_TOKENS) if peer is not None else 1.0
        if number:
            turns.append((rate, theirs))
    yield _figure("prompt", f"{what}, a prompt of {PROMPT_TOKENS}", turns, peer, PROMPT_GOAL)


def _figure(
    part: str,
    what: str,
    turns: Sequence[tuple[float, float]],
    peer: Peer | None,
    goal: float | None,
) -> Figure:
    if peer is None:
        return counted(part, what, "tokens/s", [ours for ours, _ in turns])
    return compared(part, f"{what} / llama.cpp", "tokens/s", turns, at_least=goal)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    description, _, epilog = (__doc__ or "").partition("\n\nExample:")
    parser = argparse.ArgumentParser(
        prog="python -m bench.batch",
        description=description,
        epilog=f"Example:{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", action="append", choices=sorted(LAYERS), help="default: all")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--sequences", type=int, action="append", help="default: 1, 2, 4 ... 64")
    parser.add_argument(
        "--activations", type=int, action="append", choices=(8, 16), help="default: both"
    )
    parser.add_argument("--steps", type=int, default=24, help="of a round; 24")
    parser.add_argument("--rounds", type=int, default=3, help="that count; 3")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each; all cores")
    parser.add_argument(
        "--llama-python", help="an interpreter that has llama-cpp-python and gguf; else only ours"
    )
    parser.add_argument("--dir", type=Path, help="where to write models; default: $TMPDIR or /tmp")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see it work")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    if not options.llama_python:
        console.print("without --llama-python PATH only ours is measured", highlight=False)
    figures: list[Figure] = []
    with progress(console, "starting"):
        for shape in options.shape or LAYERS:
            with (
                tempfile.TemporaryDirectory(prefix="bench-", dir=options.dir) as folder,
                ExitStack() as stack,
            ):
                try:
                    for figure in measure(shape, options, Path(folder), stack):
                        figures.append(figure)
                        value = figure.ours if figure.ratio is None else figure.ratio
                        console.print(f"  {figure.what}: {value:.3g}", highlight=False)
                except PeerError as error:
                    raise SystemExit(f"bench.batch: {error}") from error
    load = os.getloadavg()[0]
    if options.json:
        rows = [asdict(figure) for figure in figures]
        print(json.dumps({"figures": rows, "load_average": load}, indent=1))
    else:
        show(figures, "many sequences at once on this host")
        print(f"{options.threads} threads, load average {load:.1f} on {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
