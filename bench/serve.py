"""A server with many clients, beside llama-server: make bench-serve.

A pack of a real model's shape is served by ``expert-run serve``, and 1 to 32 clients ask at once
for continuations of prompts of 128 and 512 tokens. llama-server has the same shape at the same bits
per weight (Q4_0) and as many slots; its weights are repacked for its kernels, and each slot has KV
memory of its own, which is its fastest. One client program asks both, in turns, for the same number
of tokens; the figures are all clients' new tokens per second from the first request to the last
token, and the seconds to the first token and between tokens. Where a round takes long there are
fewer of them, one at least. Beside that: what the server adds to a step of an engine, what a
grammar for each sequence adds, what a cached prompt costs, when a client that leaves makes room,
the memory of all processes, the start, and a switch between two models of which the daemon's budget
holds one and a quarter.

Example: python -m bench.serve --llama-server ~/llama.cpp/build/bin/llama-server
             --llama-python ~/llama/bin/python --json
         python -m bench.serve --layers 4 --clients 16 --clients 32
"""

import argparse
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

# Before torch: its threads must sleep while ours compute, as in expert-run.
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}

import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench.figures import Bench, Figure, compared, counted
from bench.footprint import footprint
from bench.llama_server import LlamaServer, llama_server
from bench.load_client import PERCENTILES, Load, LoadClient, LoadError
from bench.peer import CONTEXT, PeerError
from bench.report import report
from bench.serve_costs import STEP_CLIENTS, own_costs, starts, switches
from bench.synthetic import SHAPES, TINY, make_pack
from expertd.packing.schemes import choose_scheme
from expertd_testing.daemon import Daemon, serving
from expertd_testing.server import Server, serving_http
from expertstore.pack.manifest import read_manifest

SHAPE = "olmoe-1b-7b"
CLIENTS = (1, 4, 8, 16, 32)
PROMPTS = (128, 512)
GOALS = {8: 1.2, 16: 1.5, 32: 1.5}
"""At least so many times llama-server's rate, by clients."""
STAGES = ("load", "costs", "start", "switch")
SPARE_TOKENS = 64
"""Of each sequence's room, beyond its prompt and its new tokens."""


def measure(bench: Bench) -> Iterator[Figure | str]:
    """All of it, as a part of ``make bench``."""
    arguments = [*QUICK] if bench.quick else []
    arguments += ["--llama-python", bench.llama_python, "--llama-server", bench.llama_server]
    yield from _measure(_parser().parse_args(arguments), bench.folder, bench.say)


def _measure(
    options: argparse.Namespace, folder: Path, say: Callable[[str], None]
) -> Iterator[Figure | str]:
    stages = options.only or STAGES
    overrides = TINY if options.quick else None
    layers = options.layers or SHAPES[SHAPE]["num_hidden_layers"]
    config = {**SHAPES[SHAPE], **(overrides or {}), "num_hidden_layers": layers}
    say("serve: writing the model")
    scheme = choose_scheme("4bit", *["4g64"] * 4)
    packs = {}
    for name in ("m", "n") if "switch" in stages else ("m",):
        packs[name] = make_pack(folder / name, SHAPE, scheme, layers, overrides=overrides)
        write_tokenizer(packs[name], config["vocab_size"])
    expert_bytes = read_manifest(packs["m"]).manifest.expert_bytes
    what = f"{SHAPE}, {layers} layers"
    with serving({"m": packs["m"]}, ram=expert_bytes, socket=folder / "s") as daemon:
        if "load" in stages or "costs" in stages:
            yield from _served(what, options, config, packs["m"], daemon, folder, say)
        if "start" in stages:
            say("serve: starting")
            yield from _or_why(starts(what, options, daemon.socket, config["vocab_size"]))
    if "switch" in stages:
        say("serve: switching between two models")
        figures = switches(what, options, packs, expert_bytes, config["vocab_size"])
        yield from _or_why(figures)


def _served(
    what: str,
    options: argparse.Namespace,
    config: Mapping[str, Any],
    pack: Path,
    daemon: Daemon,
    folder: Path,
    say: Callable[[str], None],
) -> Iterator[Figure | str]:
    """What one server is asked for, with all experts in RAM."""
    stages = options.only or STAGES
    clients, prompts = options.clients or CLIENTS, options.prompt or PROMPTS
    most = max(*clients, STEP_CLIENTS)
    tokens = most * (max(*prompts, 2 * CONTEXT) + options.new_tokens + SPARE_TOKENS)
    with serving_http(
        *("--socket", str(daemon.socket), "--threads", str(options.threads)),
        *("--max-sequences", str(most), "--kv-tokens", str(tokens)),
    ) as ours:
        client = LoadClient(ours.url, config["vocab_size"])
        if "load" in stages:
            with ExitStack() as stack:
                llama: LlamaServer | None = None
                room = {"slots": most, "tokens": tokens, "threads": options.threads}
                programs = options.llama_server, options.llama_python
                try:
                    llama = stack.enter_context(llama_server(*programs, folder, config, **room))
                except PeerError as error:
                    yield str(error)
                peer = llama and LoadClient(llama.url, config["vocab_size"])
                say("serve: warming up")
                for one in (client, *([peer] if peer else [])):
                    one.load(2, min(prompts), 4)
                for prompt_tokens in prompts:
                    for number in clients:
                        row = f"{number} clients, prompts of {prompt_tokens}"
                        say(f"serve: {row}")
                        yield from _or_why(
                            _loads(f"{what}, {row}", options, client, peer, number, prompt_tokens)
                        )
                yield from _memory(what, pack, daemon, ours, llama)
        if "costs" in stages:
            yield from _or_why(own_costs(what, options, daemon.socket, client, most, say))


def _or_why(figures: Iterator[Figure]) -> Iterator[Figure | str]:
    """Those that there are; a server that fails takes no other figures with it."""
    try:
        yield from figures
    except LoadError as error:
        yield str(error)


def _loads(
    what: str,
    options: argparse.Namespace,
    client: LoadClient,
    peer: LoadClient | None,
    number: int,
    prompt_tokens: int,
) -> Iterator[Figure]:
    turns: list[tuple[Load, Load | None]] = []
    until = time.monotonic() + options.cell_seconds
    while not turns or (len(turns) < options.rounds and time.monotonic() < until):
        ours = client.load(number, prompt_tokens, options.new_tokens)
        theirs = peer and peer.load(number, prompt_tokens, options.new_tokens)
        turns.append((ours, theirs))

    def figure(
        name: str, unit: str, value: Callable[[Load], float], at_least: float | None = None
    ) -> Figure:
        pairs = [(value(ours), value(theirs)) for ours, theirs in turns if theirs is not None]
        if pairs:
            name += " / llama-server"
            return compared("serve", f"{what}: {name}", unit, pairs, at_least=at_least)
        values = [value(ours) for ours, _ in turns]
        return counted("serve", f"{what}: {name}", unit, values)

    yield figure("output", "tokens/s", lambda load: load.tokens_per_second, GOALS.get(number))
    for percent in PERCENTILES:
        yield figure(f"first token, p{percent}", "s", lambda load, at=percent: load.first(at))  # type: ignore[misc]
    for percent in PERCENTILES:
        yield figure(f"between tokens, p{percent}", "s", lambda load, at=percent: load.between(at))  # type: ignore[misc]


def _memory(
    what: str, pack: Path, daemon: Daemon, ours: Server, llama: LlamaServer | None
) -> Iterator[Figure]:
    """PSS of all processes, after everything was asked."""
    pids = [daemon.pid, ours.pid, *ours.descendants]
    total = sum(footprint(pid, pack).total for pid in pids) / (1 << 20)
    name = f"{what}: memory of all processes (PSS)"
    if llama is None:
        yield counted("serve", name, "MiB", [total])
    else:
        theirs = footprint(llama.pid, pack).total / (1 << 20)
        yield compared("serve", f"{name} / llama-server", "MiB", [(total, theirs)])


def write_tokenizer(pack: Path, vocabulary: int) -> None:
    """One of bytes and made-up words, so that tokens become texts as with a real one."""
    letters = pre_tokenizers.ByteLevel.alphabet()
    words = [*sorted(letters), *(f"w{number}" for number in range(vocabulary))][:vocabulary]
    tokenizer = Tokenizer(models.BPE({word: at for at, word in enumerate(words)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(pack)


def _parser() -> argparse.ArgumentParser:
    description, _, epilog = (__doc__ or "").partition("\n\nExample:")
    parser = argparse.ArgumentParser(
        prog="python -m bench.serve",
        description=description,
        epilog=f"Example:{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--only", action="append", choices=STAGES, help="a part of it; may be repeated"
    )
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--clients", type=int, action="append", help="default: 1, 4, 8, 16, 32")
    parser.add_argument("--prompt", type=int, action="append", help="tokens; default: 128, 512")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each request; 64")
    parser.add_argument("--cached-tokens", type=int, default=1000, help="1000")
    parser.add_argument("--steps", type=int, default=32, help="of a round; 32")
    parser.add_argument("--rounds", type=int, default=3, help="that count; 3")
    parser.add_argument(
        "--cell-seconds",
        type=float,
        default=30.0,
        help="after so long no further round is begun of one number of clients; 30",
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each; all cores")
    parser.add_argument(
        "--llama-server",
        metavar="PROGRAM",
        default="",
        help="llama-server, to be measured in turns with ours",
    )
    parser.add_argument(
        "--llama-python",
        default="",
        help="an interpreter that has llama-cpp-python and gguf, to write for it",
    )
    parser.add_argument("--dir", type=Path, help="where to write models; default: $TMPDIR or /tmp")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see it work")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


QUICK = [
    *("--quick", "--layers", "2", "--clients", "1", "--clients", "3", "--prompt", "20"),
    *("--new-tokens", "4", "--cached-tokens", "200", "--steps", "2", "--rounds", "1"),
]
"""Everything once, of a tiny model."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    arguments = [*(sys.argv[1:] if arguments is None else arguments)]
    if "--quick" in arguments:
        arguments = [*QUICK, *arguments]
    options = _parser().parse_args(arguments)
    report(partial(_measure, options), "a server with many clients on this host", options)


if __name__ == "__main__":
    main()
