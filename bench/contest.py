"""Other programs beside ours, on the same shape, in the same run.

A model of OLMoE-1B-7B's shape with random weights, cut to as many layers as let all contestants
stay in memory at once; they take turns, each in a process of its own with as many threads as there
are cores, and with nothing in its environment that is meant for another. Memory is PSS after the
turns; ours has the daemon's in it. How each is set up is told in [peers.md](peers.md).

- *ours*: every matrix in 4 bits, experts in the daemon's shared memory
- *llama.cpp*: Q4_0, which is as many bits; *private* is copied and repacked for its kernels,
  *shared* stays in the page cache, which other processes can use as well
- *transformers*: stock, bf16, 3.6 times the bytes

Then memory is limited to less than the bf16 model: accelerate offloads to disk what does not fit,
in a control group that holds its page cache to the same limit, and ours, whose model in 4 bits is
smaller, is given half of its experts' size, so that it reads from disk too, past the page cache.

Example: python -m bench peers --llama-python ~/llama/bin/python
"""

import importlib.util
import os
import statistics
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

from bench.checkpoint import checkpoint_bytes, make_checkpoint
from bench.decode import Contestant, Turns
from bench.figures import Bench, Figure, compared, quartiles
from bench.footprint import footprint
from bench.memory_limit import MemoryLimit, NoLimitError
from bench.peer import Peer, PeerError, make_gguf
from bench.results import Table
from bench.synthetic import TINY, config_of, make_pack
from expertd.packing.schemes import choose_scheme
from expertd_testing.daemon import serving
from expertstore.pack.manifest import read_manifest
from expertstore.shared.host_memory import memory_available

SHAPE = "olmoe-1b-7b"
LAYERS = (16, 8, 4, 2)
OURS, PRIVATE, SHARED, STOCK, OFFLOAD = (
    "ours",
    "llama.cpp, private",
    "llama.cpp, shared",
    "transformers, bf16",
    "accelerate, to disk",
)
_TIMES_CHECKPOINT = 2.2
"""Of the bf16 checkpoint's size: it, three models in 4 bits, and some of it in the page cache."""
_RESERVE_BYTES = 2 << 30
_OFFLOAD_SHARE = 0.6
_GIB = 1 << 30


def measure(bench: Bench) -> Iterator[Figure | Table | str]:
    """All in memory, then less memory than model."""
    room = memory_available() - _RESERVE_BYTES
    fitting = [n for n in LAYERS if _TIMES_CHECKPOINT * checkpoint_bytes(SHAPE, n) < room]
    if bench.quick:
        fitting = [2]
    if not fitting:
        yield f"anything: two layers do not fit in the {room / _GIB:.1f} GiB that are free"
        return
    layers = fitting[0]
    overrides = TINY if bench.quick else None
    bench.say(f"peers: models of {layers} layers")
    scheme = choose_scheme("4bit", *("4g64",) * 4)
    # Every expert has a record of its own: the disk is to be read, not a few places of it.
    pack = make_pack(
        bench.folder / "pack", SHAPE, scheme, layers, distinct_records=None, overrides=overrides
    )
    checkpoint = make_checkpoint(bench.folder / "stock", SHAPE, layers, overrides=overrides)
    yield from _in_memory(bench, pack, checkpoint, layers)
    yield from _limited(bench, pack, checkpoint, layers)
    yield (
        "FreeToken: it needs a GPU and a real checkpoint, and was never run;"
        " bench/peers/freetoken.py measures a server of it (docs/peers.md)"
    )


def _in_memory(
    bench: Bench, pack: Path, checkpoint: Path, layers: int
) -> Iterator[Figure | Table | str]:
    threads = os.cpu_count() or 1
    config = config_of(SHAPE, layers, TINY if bench.quick else None)
    with ExitStack() as stack:
        peers: dict[str, Peer] = {}
        ram = read_manifest(pack).manifest.expert_bytes
        daemon = stack.enter_context(serving({"m": pack}, ram=ram, socket=bench.folder / "s"))
        arguments = {"socket": str(daemon.socket), "model": "m", "threads": threads}
        ours = Peer("ours", arguments, python=sys.executable, environment=os.environ)
        peers[OURS] = stack.enter_context(ours)
        llama = bench.llama_python
        gguf = bench.folder / "model.gguf"
        if not llama:
            yield "llama.cpp: --llama-python names no interpreter that has it (docs/peers.md)"
        else:
            try:
                make_gguf(llama, gguf, config)
            except PeerError as error:
                yield str(error)
            else:
                for name, load in ((PRIVATE, "private"), (SHARED, "shared")):
                    job = {"path": str(gguf), "load": load, "threads": threads, "context": 2048}
                    job["vocab"] = config["vocab_size"]
                    peers[name] = stack.enter_context(Peer("llama", job, python=llama))
        job = {"path": str(checkpoint), "threads": threads}
        peers[STOCK] = stack.enter_context(Peer("stock", job, python=sys.executable))
        ready: dict[str, Contestant] = {}
        for name, peer in peers.items():
            bench.say(f"peers: loading {name}")
            try:
                ready[name] = peer.wait_ready()
            except PeerError as error:
                if name == OURS:
                    raise
                yield f"{name}: {error}"
        tokens = (4, 8) if bench.quick else (32, 256)
        turns = Turns(min(4, bench.rounds), *tokens).run(ready, bench.say)
        memory = {name: footprint(peers[name].pid, pack).total for name in ready}
        memory[OURS] += footprint(daemon.pid, pack).total
    yield _table(f"{SHAPE}, {layers} layers, all in memory", turns, memory)
    for kind, values in (("decode", turns.decode), ("a prompt", turns.prompt)):
        for name in ready:
            if name != OURS:
                pairs = list(zip(values[OURS], values[name], strict=True))
                yield compared("peers", f"{kind}: ours / {name}", "tokens/s", pairs)
    for name in ready:
        if name != OURS:
            pair = (memory[OURS] / _GIB, memory[name] / _GIB)
            yield compared("peers", f"memory: ours / {name}", "GiB", [pair])


def _limited(
    bench: Bench, pack: Path, checkpoint: Path, layers: int
) -> Iterator[Figure | Table | str]:
    if importlib.util.find_spec("accelerate") is None:
        yield "accelerate: it is not installed (docs/peers.md)"
        return
    threads = os.cpu_count() or 1
    manifest = read_manifest(pack).manifest
    size = (checkpoint / "model.safetensors").stat().st_size
    limit_bytes = int(_OFFLOAD_SHARE * size) + (1 << 30)
    ram = max(manifest.expert_bytes // 2, manifest.working_set_bytes)
    with ExitStack() as stack:
        direct = ["--disk-io", "direct"]  # the page cache would be RAM beside the limit
        socket = bench.folder / "l"
        daemon = stack.enter_context(serving({"m": pack}, ram=ram, socket=socket, arguments=direct))
        job = {"socket": str(daemon.socket), "model": "m", "threads": threads}
        ours = stack.enter_context(
            Peer("ours", job, python=sys.executable, environment=os.environ)
        ).wait_ready()
        try:
            limit = stack.enter_context(MemoryLimit("expertd-peers"))
            limit.set(limit_bytes)
        except NoLimitError as error:
            yield f"accelerate under a limit of memory: {error}"
            return
        job = {
            "path": str(checkpoint),
            "threads": threads,
            "offload": str(bench.folder / "offload"),
            # What is left is for the layer that is read, and the interpreter.
            "max_memory": size // 4,
        }
        # What others have in the page cache would not count against its limit.
        with (checkpoint / "model.safetensors").open("rb+") as file:
            os.fdatasync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        bench.say(f"peers: loading {OFFLOAD}")
        theirs = stack.enter_context(Peer("stock", job, python=sys.executable))
        limit.joined_by.write_text(str(theirs.pid))
        try:
            theirs.wait_ready()
            tokens = (2, 2) if bench.quick else (4, 16)
            turns = Turns(1 if bench.quick else 2, *tokens)
            turns.run({OURS: ours, OFFLOAD: theirs}, bench.say)
        except PeerError as error:
            yield f"accelerate with {limit_bytes / _GIB:.1f} GiB of memory: {error}"
            return
        most_bytes = limit.most_bytes()
        memory = {OFFLOAD: footprint(theirs.pid, pack).total}
        memory[OURS] = footprint(ours.pid, pack).total + footprint(daemon.pid, pack).total
    yield _table(
        f"{SHAPE}, {layers} layers: accelerate in {limit_bytes / _GIB:.1f} GiB, ours with RAM for"
        " half of its experts",
        turns,
        memory,
        f"accelerate's control group held {most_bytes / _GIB:.2f} GiB at most, page cache and all.",
    )
    pairs = list(zip(turns.decode[OURS], turns.decode[OFFLOAD], strict=True))
    yield compared("peers", f"decode from disk: ours / {OFFLOAD}", "tokens/s", pairs)


def _table(title: str, turns: Turns, memory: dict[str, int], note: str = "") -> Table:
    def cell(values: list[float]) -> str:
        low, high = quartiles(values)
        return f"{statistics.median(values):.3g} ({low:.3g} to {high:.3g})"

    return Table(
        title,
        ("", "decode, tokens/s", "prompt, tokens/s", "memory, GiB (PSS)"),
        tuple(
            (name, cell(turns.decode[name]), cell(turns.prompt[name]), f"{memory[name] / _GIB:.2f}")
            for name in turns.decode
        ),
        note,
    )
