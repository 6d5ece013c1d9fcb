"""Tokens per second of many sequences at once, beside other engines: make bench-batch.

A pack of a real model's shape is served by a daemon, and an engine decodes 1 to 64 sequences
together. llama.cpp and ik_llama.cpp have the same shape at the same bits per weight (Q4_0) and
decode as many sequences in each of their steps: *private* from a copy that is repacked for their
kernels, *shared* from the page cache, one copy for all processes, as ours is. Each count of
sequences is measured in turns; the figures are all sequences' tokens per second after a context of
64 tokens. ik_llama.cpp runs its own ``llama-batched-bench``, with one
sequence.

Example: python -m bench.batch --shape olmoe-1b-7b --llama-python ~/llama/bin/python --json
         python -m bench.batch --shape qwen3-30b-a3b --layers 8 --activations 8
"""

import argparse
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from operator import methodcaller
from pathlib import Path
from typing import Any, Protocol

# Before torch: its threads must sleep while ours compute, as in expert-run.
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}

import torch

from bench.figures import Bench, Figure, compared, counted
from bench.peer import CONTEXT, Peer, PeerError, make_gguf
from bench.report import report
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
PRIVATE, SHARED, IK = "llama.cpp, private", "llama.cpp, shared", "ik_llama.cpp, private"
ALONE = {SHARED, IK}
"""Measured with one sequence only. One copy for all processes is slower at every count. And
llama-batched-bench gives all sequences and all of a prompt the same token, so that all rows of a
step ask the same experts, and far fewer weights are read than for texts."""
GOALS = {
    (16, PRIVATE): {1: 1.1, 8: 1.2, 16: 1.5, 32: 1.5, 64: 1.5},
    (16, SHARED): {1: 1.7},
    (8, PRIVATE): {8: 1.2, 16: 2.0, 32: 2.0, 64: 2.0},
}
"""At least so many times a peer's rate by sequences, for bits of our activations and a peer."""
PROMPT_TOKENS, PROMPT_GOAL = 512, 1.5


class Contestant(Protocol):
    """Who is measured."""

    def decode(self, steps: int, sequences: int) -> float:
        """Tokens per second of the steps in which all sequences decode."""

    def prompt(self, tokens: int) -> float:
        """Tokens per second of a prompt."""


class Theirs:
    """A peer."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def decode(self, steps: int, sequences: int) -> float:
        """Tokens per second of the steps in which all sequences decode."""
        answer = self._peer.ask(f"batch {steps} {sequences} {CONTEXT}")
        return steps * sequences / float(answer["seconds"])

    def prompt(self, tokens: int) -> float:
        """Tokens per second of a prompt."""
        return tokens / self._peer.prompt(tokens)


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


def measure(bench: Bench) -> Iterator[Figure | str]:
    """All shapes, as a part of ``make bench``."""
    arguments = ["--llama-python", bench.llama_python] if bench.llama_python else []
    arguments += ["--ik-bench", bench.ik_bench] if bench.ik_bench else []
    arguments += ["--quick", "--steps", "2", "--rounds", "1"] if bench.quick else []
    try:
        yield from _measure(_parser().parse_args(arguments), bench.folder, bench.say)
    except PeerError as error:
        yield str(error)


def _measure(
    options: argparse.Namespace, folder: Path, say: Callable[[str], None]
) -> Iterator[Figure | str]:
    if not options.llama_python:
        yield "llama.cpp: --llama-python names no interpreter that has it (docs/peers.md)"
    if not options.ik_bench:
        yield "ik_llama.cpp: --ik-bench names no program of it (docs/peers.md)"
    for shape in options.shape or LAYERS:
        say(f"batch: {shape}, writing")
        place = folder / shape
        place.mkdir()
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, place)
            yield from _shape(shape, options, place, stack, say)


def _shape(
    shape: str,
    options: argparse.Namespace,
    folder: Path,
    stack: ExitStack,
    say: Callable[[str], None],
) -> Iterator[Figure | str]:
    layers = options.layers or LAYERS[shape]
    overrides = TINY if options.quick else None
    precision = "4g64"
    scheme = choose_scheme("4bit", precision, precision, precision, precision)
    pack = make_pack(folder / "pack", shape, scheme, layers, overrides=overrides)
    ram = read_manifest(pack).manifest.expert_bytes
    daemon = stack.enter_context(serving({"m": pack}, ram=ram, socket=folder / "s"))
    config = {**SHAPES[shape], **(overrides or {}), "num_hidden_layers": layers}
    peers = _peers(options, folder / "model.gguf", config)
    for process in peers.values():
        stack.enter_context(process)
    for process in peers.values():
        process.wait_ready()
    theirs: dict[str, Contestant] = {name: Theirs(one) for name, one in peers.items()}
    ours: dict[int, Contestant] = {}
    for activations in options.activations or (16, 8):
        engine = Ours(daemon.socket, activations)
        stack.callback(engine.close)
        ours[activations], executor = engine, engine.executor
    say(f"batch: {shape}, warming up")
    for one in ours.values():
        one.decode(options.steps, 4)
    for name, peer in [*theirs.items()]:
        try:
            peer.decode(options.steps, 4)
        except PeerError as error:
            yield f"{shape}: {error}"
            del theirs[name]
    what = f"{shape}, {layers} layers, {executor}"
    for sequences in options.sequences or SEQUENCES:
        say(f"batch: {what}, {sequences} sequences")
        them = {name: one for name, one in theirs.items() if name not in ALONE or sequences == 1}
        goals = {
            (activations, name): goal[sequences]
            for (activations, name), goal in GOALS.items()
            if sequences in goal
        }
        decode = methodcaller("decode", options.steps, sequences)
        yield from _turns(
            f"{what}, {sequences} sequences", options.rounds, goals, decode, ours, them
        )
    say(f"batch: {what}, prompts")
    them = {name: one for name, one in theirs.items() if name not in ALONE}
    goals = {(16, PRIVATE): PROMPT_GOAL}
    prompt = methodcaller("prompt", PROMPT_TOKENS)
    what += f", a prompt of {PROMPT_TOKENS}"
    yield from _turns(what, options.rounds, goals, prompt, ours, them)


def _peers(options: argparse.Namespace, path: Path, config: dict[str, Any]) -> dict[str, Peer]:
    """Those that there are, starting."""
    peers = {}
    if options.llama_python:
        make_gguf(options.llama_python, path, config)
        job = {
            "path": str(path),
            "threads": options.threads,
            "context": max(SEQUENCES) * (CONTEXT + options.steps + 64),
        }
        for name, load in ((PRIVATE, "private"), (SHARED, "shared")):
            more = {"load": load, "vocab": config["vocab_size"], "sequences": max(SEQUENCES)}
            peers[name] = Peer("llama", job | more, python=options.llama_python)
        if options.ik_bench:
            more = {"program": options.ik_bench}
            peers[IK] = Peer("ik_llama", job | more, python=sys.executable)
    return peers


def _turns(
    what: str,
    rounds: int,
    goals: Mapping[tuple[int, str], float],
    measure: Callable[[Contestant], float],
    ours: Mapping[int, Contestant],
    theirs: Mapping[str, Contestant],
) -> Iterator[Figure]:
    """All of ours and of theirs in each round."""
    turns = [
        (
            {bits: measure(one) for bits, one in ours.items()},
            {name: measure(one) for name, one in theirs.items()},
        )
        for _ in range(rounds)
    ]
    for bits in ours:
        one = f"{what}: {bits}-bit activations"
        if not theirs:
            yield counted("batch", one, "tokens/s", [rates[bits] for rates, _ in turns])
        for name in theirs:
            pairs = [(rates[bits], others[name]) for rates, others in turns]
            goal = goals.get((bits, name))
            yield compared("batch", f"{one} / {name}", "tokens/s", pairs, at_least=goal)


def _parser() -> argparse.ArgumentParser:
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
    parser.add_argument(
        "--ik-bench",
        metavar="PROGRAM",
        help="llama-batched-bench of ik_llama.cpp, to be measured as well",
    )
    parser.add_argument("--dir", type=Path, help="where to write models; default: $TMPDIR or /tmp")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see it work")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    options = _parser().parse_args(arguments)
    measured = partial(_measure, options)
    report(measured, "many sequences at once on this host", options)


if __name__ == "__main__":
    main()
