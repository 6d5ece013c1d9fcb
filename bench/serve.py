"""A server with many clients, beside llama-server: make bench-serve.

A pack of a real model's shape is served by ``expert-run serve``, and 1 to 32 clients ask at once
for continuations of prompts of 128 and 512 tokens. llama-server has the same shape at the same bits
per weight (Q4_0) and as many slots. One client program asks both, in turns; the figures are all
clients' new tokens per second, and the seconds to the first token and between tokens. Beside that:
what the server adds to a step of an engine, what a cached prompt costs, when a client that leaves
makes room, the memory of all processes, and a switch between two models of which the daemon's
budget holds one and a quarter.

Example: python -m bench.serve --llama-server ~/llama.cpp/build/bin/llama-server
             --llama-python ~/llama/bin/python --json
         python -m bench.serve --layers 4 --clients 16 --clients 32
"""

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

# Before torch: its threads must sleep while ours compute, as in expert-run.
os.environ |= {"OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}

import torch
import transformers
from rich.console import Console
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from bench.batch import Ours
from bench.figures import Figure, compared, counted
from bench.footprint import footprint
from bench.load_client import PERCENTILES, Load, LoadClient, LoadError
from bench.peer import CONTEXT, PeerError, clean_environment, make_gguf
from bench.progress import progress
from bench.store import show
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
STEP_CLIENTS, STEP_GOAL = 16, 1.05
CACHED_TOKENS, CACHED_GOAL = 1000, 0.05
PLACE_GOAL = 2.5
"""Steps: the rest of the one that is computed, that of the next sequence, and the way there."""
SWITCH_BUDGET = 1.25
"""Of the experts of one of two models."""
IDLE_SECONDS = 0.5
START_SECONDS = 300.0


def _measure(
    options: argparse.Namespace, folder: Path, say: Callable[[str], None]
) -> Iterator[Figure | str]:
    overrides = TINY if options.quick else None
    clients, prompts = options.clients or CLIENTS, options.prompt or PROMPTS
    most, longest = max(*clients, STEP_CLIENTS), max(*prompts, options.cached_tokens + 16)
    layers = options.layers or SHAPES[SHAPE]["num_hidden_layers"]
    config = {**SHAPES[SHAPE], **(overrides or {}), "num_hidden_layers": layers}
    vocabulary = config["vocab_size"]
    say("serve: writing the model")
    scheme = choose_scheme("4bit", *["4g64"] * 4)
    pack = make_pack(folder / "pack", SHAPE, scheme, layers, overrides=overrides)
    write_tokenizer(pack, vocabulary)
    expert_bytes = read_manifest(pack).manifest.expert_bytes
    tokens = most * (longest + options.new_tokens + 64)
    what = f"{SHAPE}, {layers} layers"
    with (
        serving({"m": pack}, ram=expert_bytes, socket=folder / "s") as daemon,
        _ours(daemon, options, most, tokens) as ours,
    ):
        client = LoadClient(ours.url, vocabulary)
        with ExitStack() as stack:
            llama: tuple[int, LoadClient] | None = None
            try:
                starting = _llama(options, folder, config, most, tokens, vocabulary)
                llama = stack.enter_context(starting)
            except PeerError as error:
                yield str(error)
            say("serve: warming up")
            for one in (client, *([] if llama is None else [llama[1]])):
                one.load(2, min(prompts), 4)
            for tokens_each in prompts:
                for number in clients:
                    say(f"serve: {number} clients, prompts of {tokens_each}")
                    row = f"{what}, {number} clients, prompts of {tokens_each}"
                    yield from _loads(row, options, client, llama, number, tokens_each)
            yield from _memory(what, pack, daemon, ours, llama)
        yield from _own_costs(what, options, daemon, client, most, say)
    say("serve: switching between two models")
    other = make_pack(folder / "other", SHAPE, scheme, layers, overrides=overrides)
    write_tokenizer(other, vocabulary)
    yield from _switch(
        what, options, {"m": pack, "n": other}, int(expert_bytes * SWITCH_BUDGET), vocabulary
    )


def _loads(
    what: str,
    options: argparse.Namespace,
    client: LoadClient,
    llama: tuple[int, LoadClient] | None,
    number: int,
    prompt_tokens: int,
) -> Iterator[Figure]:
    turns: list[tuple[Load, Load | None]] = []
    for _ in range(options.rounds):
        ours = client.load(number, prompt_tokens, options.new_tokens)
        theirs = llama and llama[1].load(number, prompt_tokens, options.new_tokens)
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
    what: str, pack: Path, daemon: Daemon, ours: Server, llama: tuple[int, LoadClient] | None
) -> Iterator[Figure]:
    """PSS of all processes, after everything was asked."""
    pids = [daemon.pid, ours.pid, *ours.descendants]
    total = sum(footprint(pid, pack).total for pid in pids) / (1 << 20)
    name = f"{what}: memory of all processes (PSS)"
    if llama is None:
        yield counted("serve", name, "MiB", [total])
    else:
        theirs = footprint(llama[0], pack).total / (1 << 20)
        yield compared("serve", f"{name} / llama-server", "MiB", [(total, theirs)])


def _own_costs(
    what: str,
    options: argparse.Namespace,
    daemon: Daemon,
    client: LoadClient,
    places: int,
    say: Callable[[str], None],
) -> Iterator[Figure]:
    say("serve: what the server adds to a step")
    number, steps = STEP_CLIENTS, options.steps
    engine = Ours(daemon.socket, 16)
    try:
        engine.decode(2, number)
        client.step_seconds(number, CONTEXT, 2)
        turns = [
            (client.step_seconds(number, CONTEXT, steps), number / engine.decode(steps, number))
            for _ in range(options.rounds)
        ]
    finally:
        engine.close()
    yield compared(
        "serve",
        f"{what}: a step of {number} sequences, by the server / by an engine in the process",
        "s",
        turns,
        at_most=STEP_GOAL,
    )
    say("serve: cached prompts")
    turns = []
    for _ in range(options.rounds):
        prefix = client.prompt(options.cached_tokens)
        cold = client.first(prefix + client.prompt(16))
        turns.append((client.first(prefix + client.prompt(16)), cold))
    yield compared(
        "serve",
        f"{what}: first token after {options.cached_tokens} cached tokens and 16 others / cold",
        "s",
        turns,
        at_most=CACHED_GOAL,
    )
    say("serve: a client that leaves")
    waits = [client.steps_to_a_place(places, 400) for _ in range(options.rounds)]
    yield counted(
        "serve",
        f"{what}: from one client's leaving to the first token of one that waits",
        "steps",
        waits,
        at_most=PLACE_GOAL,
    )


def _switch(
    what: str, options: argparse.Namespace, packs: Mapping[str, Path], ram: int, vocabulary: int
) -> Iterator[Figure]:
    with (
        serving(packs, ram=ram) as daemon,
        serving_http(
            *("--socket", str(daemon.socket), "--threads", str(options.threads)),
            *("--idle-seconds", str(IDLE_SECONDS), "--kv-tokens", "4096"),
        ) as server,
    ):
        clients = {name: LoadClient(server.url, vocabulary, name) for name in packs}
        prompt = clients["m"].prompt(16)
        firsts: dict[str, list[float]] = {"again": [], "switch": []}
        for client in clients.values():
            client.first(prompt)
        for _ in range(options.rounds):
            for client in clients.values():
                for kind in ("switch", "again"):
                    while server.engines:
                        time.sleep(0.05)
                    firsts[kind].append(client.first(prompt))
    limit = f"RAM for {SWITCH_BUDGET:g} of two models' experts"
    for kind, name in (("switch", "the other model"), ("again", "the same model")):
        yield counted(
            "serve",
            f"{what}, {limit}: first token of {name}, whose engine was ended when idle",
            "s",
            firsts[kind],
        )


def _ours(
    daemon: Daemon, options: argparse.Namespace, most: int, tokens: int
) -> AbstractContextManager[Server]:
    return serving_http(
        *("--socket", str(daemon.socket), "--threads", str(options.threads)),
        *("--max-sequences", str(most), "--kv-tokens", str(tokens)),
    )


@contextmanager
def _llama(
    options: argparse.Namespace,
    folder: Path,
    config: Mapping[str, Any],
    slots: int,
    tokens: int,
    vocabulary: int,
) -> Iterator[tuple[int, LoadClient]]:
    """llama-server's process and a client of it. Raises PeerError without one."""
    if not (options.llama_server and options.llama_python):
        raise PeerError(
            "llama-server: --llama-server names no program of it, or --llama-python no interpreter "
            "that writes its model (docs/peers.md)."
        )
    gguf = folder / "model.gguf"
    make_gguf(options.llama_python, gguf, config)
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [options.llama_server, "-m", str(gguf), "-t", str(options.threads)]
    command += ["-np", str(slots), "-c", str(tokens), "-kvu", "--no-webui"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    with (folder / "llama.log").open("wb") as log:
        try:
            process = subprocess.Popen(
                command, stdout=log, stderr=log, env=dict(clean_environment())
            )
        except OSError as error:
            raise PeerError(f"llama-server cannot be run: {error.strerror}.") from error
        try:
            url = f"http://127.0.0.1:{port}"
            _wait_healthy(url, process, folder / "llama.log")
            yield process.pid, LoadClient(url, vocabulary)
        finally:
            process.kill()
            process.wait()


def _wait_healthy(url: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    until = time.monotonic() + START_SECONDS
    while time.monotonic() < until and process.poll() is None:
        try:
            urllib.request.urlopen(f"{url}/health", timeout=5).close()
        except OSError:
            time.sleep(0.2)
        else:
            return
    said = log.read_text(errors="replace").strip().splitlines() or ["it says nothing"]
    raise PeerError(f"llama-server did not start: {said[-1]}")


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
    parser.add_argument("--layers", type=int, help="cut the model to so many layers")
    parser.add_argument("--clients", type=int, action="append", help="default: 1, 4, 8, 16, 32")
    parser.add_argument("--prompt", type=int, action="append", help="tokens; default: 128, 512")
    parser.add_argument("--new-tokens", type=int, default=64, help="of each request; 64")
    parser.add_argument("--cached-tokens", type=int, default=CACHED_TOKENS, help="1000")
    parser.add_argument("--steps", type=int, default=48, help="of a round; 48")
    parser.add_argument("--rounds", type=int, default=3, help="that count; 3")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each; all cores")
    parser.add_argument(
        "--llama-server", metavar="PROGRAM", help="llama-server, to be measured in turns with ours"
    )
    parser.add_argument(
        "--llama-python", help="an interpreter that has llama-cpp-python and gguf, to write for it"
    )
    parser.add_argument("--dir", type=Path, help="where to write models; default: $TMPDIR or /tmp")
    parser.add_argument("--quick", action="store_true", help="a tiny model, to see it work")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


QUICK = [
    *("--layers", "2", "--clients", "1", "--clients", "3", "--prompt", "20"),
    *("--new-tokens", "4", "--cached-tokens", "200", "--steps", "2", "--rounds", "1"),
]


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    arguments = [*(sys.argv[1:] if arguments is None else arguments)]
    if "--quick" in arguments:
        arguments = [*QUICK, *arguments]
    options = _parser().parse_args(arguments)
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    figures: list[Figure] = []
    with (
        progress(console, "starting") as status,
        tempfile.TemporaryDirectory(prefix="bench-", dir=options.dir) as folder,
    ):
        try:
            for figure in _measure(options, Path(folder), status.update):
                if isinstance(figure, str):
                    console.print(f"not measured: {figure}", highlight=False)
                    continue
                figures.append(figure)
                value = figure.ours if figure.ratio is None else figure.ratio
                console.print(f"  {figure.what}: {value:.3g}", highlight=False)
        except (PeerError, LoadError) as error:
            raise SystemExit(f"bench.serve: {error}") from error
    load = os.getloadavg()[0]
    if options.json:
        rows = [asdict(figure) for figure in figures]
        print(json.dumps({"figures": rows, "load_average": load}, indent=1))
    else:
        show(figures, "a server with many clients on this host")
        print(f"{options.threads} threads, load average {load:.1f} on {os.cpu_count()} CPUs")


if __name__ == "__main__":
    main()
