"""Tokens per second at real models' shapes, beside llama.cpp on the same cores: make bench-decode.

Packs are synthetic (bench/synthetic.py) and served by a daemon; the worker computes from the shared
arena. llama.cpp runs the same shape at the same bits per weight, once from a private copy that it
repacks for its kernels, and once from the page cache, which processes can share as ours do. All are
measured in turns if they fit in memory together, else one after the other (--in-turns no).

Example: python -m bench.decode --shape olmoe-1b-7b --llama-python ~/llama/bin/python --json
         python -m bench.decode --shape qwen3-30b-a3b --layers 8
"""

import argparse
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

# Before torch: its threads must sleep while ours compute, as in expert-run.
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}

import torch

from bench.figures import Figure, compared, counted
from bench.peer import CONTEXT, Peer, make_gguf
from bench.report import report
from bench.synthetic import SHAPES, TINY, make_pack
from expertd.packing.schemes import choose_scheme
from expertd_inference import GenerationSettings, Worker
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.process.attachment import attach
from expertd_testing.daemon import serving
from expertstore.pack.manifest import read_manifest
from expertstore.shared.host_memory import memory_available

LAYERS = {"olmoe-1b-7b": 16, "qwen3-30b-a3b": 48, "mixtral-8x7b": 8}
"""What is measured, and how much of it: a Mixtral of eight layers takes 7 GiB."""
_RESERVE_BYTES = 3 << 30


class Contestant(Protocol):
    """Who is measured."""

    def decode(self, tokens: int) -> float:
        """Seconds for ``tokens`` tokens, one after the other, after a context of 64."""

    def prompt(self, tokens: int) -> float:
        """Seconds for a prompt of ``tokens`` tokens and its last logits."""

    def close(self) -> None:
        """Frees its memory."""


class Ours:
    """A worker of a daemon that has all experts in RAM."""

    def __init__(
        self, folder: Path, shape: str, layers: int, precision: str, *, tiny: bool = False
    ) -> None:
        scheme = choose_scheme("4bit", precision, precision, precision, precision)
        overrides = TINY if tiny else None
        pack = make_pack(folder / "pack", shape, scheme, layers, overrides=overrides)
        self._stack = ExitStack()
        ram = _expert_bytes(pack)
        daemon = self._stack.enter_context(serving({"m": pack}, ram=ram))
        self._clock: _Clock | None = None
        if native_library().library is not None:
            self._clock = self._stack.enter_context(_Clock(native_library().library))
        self.worker = self._stack.enter_context(Worker(attach("m", daemon.socket)))
        for layer in self.worker.manifest.layers:
            for lease in self.worker.session.waves(layer.layer, range(layer.num_experts)):
                lease.release()
        self.kernels = f"{self.worker.kernels.name}, {self.worker.engine.executor}"
        self.overheads: list[float] = []
        """Seconds outside of kernels per second inside, of each :meth:`decode`."""
        self._vocab = self.worker.model.config.vocab_size

    def decode(self, tokens: int) -> float:
        """As :class:`Contestant` says."""
        # Every round has its full length.
        settings = GenerationSettings(max_new_tokens=tokens + 1, ignore_eos=True)
        clock = 0.0 if self._clock is None else self._clock.seconds
        times = [time.perf_counter()]
        stream = self.worker.engine.submit(self._tokens(CONTEXT), settings)
        times.extend(time.perf_counter() for _ in stream)
        if self._clock is not None:
            inside = self._clock.seconds - clock
            self.overheads.append((times[-1] - times[0] - inside) / inside)
        return times[-1] - times[1]

    def prompt(self, tokens: int) -> float:
        """As :class:`Contestant` says."""
        ids = self._tokens(tokens)
        began = time.perf_counter()
        list(self.worker.engine.submit(ids, GenerationSettings(max_new_tokens=1)))
        return time.perf_counter() - began

    def close(self) -> None:
        """As :class:`Contestant` says."""
        self._stack.close()

    def _tokens(self, count: int) -> list[int]:
        tokens: list[int] = torch.randint(10, self._vocab, (count,)).tolist()
        return tokens


_COMPUTING = ("linear", "experts", "dequantize", "attend_rows", "program_run", "held_step")
"""What of the native library computes a step's larger parts."""


class _Clock:
    """Adds up the time spent in native code of this process, while it is entered."""

    def __init__(self, library: Any) -> None:  # noqa: ANN401 - a ctypes.CDLL
        self.seconds = 0.0
        self._library = library
        names = [f"expertd_{name}" for name in _COMPUTING]
        self._functions = {name: getattr(library, name) for name in names}

    def __enter__(self) -> Self:
        for name, function in self._functions.items():
            setattr(self._library, name, self._timed(function))
        return self

    def __exit__(self, *_: object) -> None:
        for name, function in self._functions.items():
            setattr(self._library, name, function)

    def _timed(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*arguments: Any) -> Any:  # noqa: ANN401 - whatever the function takes
            began = time.perf_counter()
            result = function(*arguments)
            self.seconds += time.perf_counter() - began
            return result

        return timed


class Turns:
    """What each contestant took, by name: seconds of each round, decoding and for a prompt."""

    def __init__(self, rounds: int, tokens: int, prompt_tokens: int) -> None:
        self._rounds, self._tokens, self._prompt_tokens = rounds, tokens, prompt_tokens
        self.decode: dict[str, list[float]] = {}
        self.prompt: dict[str, list[float]] = {}

    def run(self, contestants: dict[str, Contestant], say: Callable[[str], None]) -> Self:
        """Measures them in turns, after one round that does not count."""
        for number in range(self._rounds + 1):
            for name, contestant in contestants.items():
                say(f"{name}, round {number} of {self._rounds}")
                decode = self._tokens / contestant.decode(self._tokens)
                prompt = self._prompt_tokens / contestant.prompt(self._prompt_tokens)
                if number:
                    self.decode.setdefault(name, []).append(decode)
                    self.prompt.setdefault(name, []).append(prompt)
        return self


PRIVATE, SHARED, OURS = "llama.cpp, private and repacked", "llama.cpp, shared", "ours"


def _measure(
    options: argparse.Namespace, folder: Path, say: Callable[[str], None]
) -> Iterator[Figure | str]:
    if not options.llama_python:
        yield "llama.cpp: --llama-python names no interpreter that has it (docs/peers.md)"
    for shape in options.shape or LAYERS:
        place = folder / shape
        place.mkdir()
        with ExitStack() as stack:
            stack.callback(shutil.rmtree, place)
            yield from _shape(shape, options, place, say)


def _shape(
    shape: str, options: argparse.Namespace, folder: Path, say: Callable[[str], None]
) -> Iterator[Figure]:
    layers = options.layers or LAYERS[shape]
    makers: dict[str, Callable[[], Contestant]] = {}
    ours: list[Ours] = []

    def make_ours() -> Ours:
        say(f"{shape}: making and loading a pack of {layers} layers")
        ours.append(Ours(folder, shape, layers, options.precision, tiny=options.quick))
        return ours[-1]

    makers[OURS] = make_ours
    config = {**SHAPES[shape], **(TINY if options.quick else {})}
    config["num_hidden_layers"] = layers
    if options.llama_python:
        path = folder / "model.gguf"
        say(f"{shape}: making a model of {layers} layers for llama.cpp")
        make_gguf(options.llama_python, path, config)
        for name, load in ((PRIVATE, "private"), (SHARED, "shared")):
            arguments = {
                "path": str(path),
                "load": load,
                "threads": options.threads,
                "context": 2048,
                "vocab": config["vocab_size"],
            }
            makers[name] = lambda arguments=arguments: Peer(
                "llama", arguments, python=options.llama_python
            ).wait_ready()
    turns = Turns(options.rounds, options.tokens, options.prompt_tokens)
    if options.in_turns == "yes" or (options.in_turns == "auto" and _fits(shape, layers)):
        with ExitStack() as stack:
            made = {}
            for name, maker in makers.items():
                made[name] = maker()
                stack.callback(made[name].close)
            turns.run(made, say)
    else:
        for name, maker in makers.items():
            contestant = maker()
            try:
                turns.run({name: contestant}, say)
            finally:
                contestant.close()
    what = f"{shape}, {layers} layers"
    yield from _figures(what, turns, ours[0])


def _figures(what: str, turns: Turns, ours: Ours) -> Iterator[Figure]:
    for kind, values, bounds in (
        ("decode", turns.decode, {PRIVATE: 1.1, SHARED: 1.7}),
        ("prompt", turns.prompt, {PRIVATE: 1.0, SHARED: None}),
    ):
        if len(values) == 1:
            yield counted(kind, f"{what}: {ours.kernels} kernels", "tokens/s", values[OURS])
        for name, bound in bounds.items():
            if name in values:
                pairs = list(zip(values[OURS], values[name], strict=True))
                yield compared(kind, f"{what} / {name}", "tokens/s", pairs, at_least=bound)
    if ours.overheads:
        yield counted(
            "overhead",
            f"{what}: time outside kernels / in them",
            "",
            ours.overheads[1:],
            at_most=0.15,
        )


def _expert_bytes(pack: Path) -> int:
    return read_manifest(pack).manifest.expert_bytes


def _fits(shape: str, layers: int) -> bool:
    """Whether three copies of the model and what else they need are less than the free memory."""
    config = SHAPES[shape]
    inner = config.get("moe_intermediate_size", config["intermediate_size"])
    experts = config.get("num_experts", config.get("num_local_experts"))
    copy = layers * experts * 3 * inner * config["hidden_size"] * 4.5 / 8
    return bool(3 * copy + _RESERVE_BYTES < memory_available())


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    description, _, epilog = (__doc__ or "").partition("\n\nExample:")
    parser = argparse.ArgumentParser(
        prog="python -m bench.decode",
        description=description,
        epilog=f"Example:{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--shape", action="append", choices=sorted(LAYERS), help="default: all")
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--precision", default="4g64", help="of every matrix of ours; 4g64")
    parser.add_argument("--tokens", type=int, default=32, help="new tokens of a round; 32")
    parser.add_argument("--prompt-tokens", type=int, default=512, help="of a round's prompt; 512")
    parser.add_argument("--rounds", type=int, default=5, help="that count; 5")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each; all cores")
    parser.add_argument(
        "--llama-python", help="an interpreter that has llama-cpp-python and gguf; else only ours"
    )
    parser.add_argument(
        "--in-turns", choices=("auto", "yes", "no"), default="auto", help="auto: if they fit in RAM"
    )
    parser.add_argument("--dir", type=Path, help="where to write models; default: $TMPDIR or /tmp")
    parser.add_argument("--quick", action="store_true", help="tiny models, to see it work")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args(arguments)
    report(partial(_measure, options), "decoding and prompts on this host", options)


if __name__ == "__main__":
    main()
