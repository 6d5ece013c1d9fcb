"""Part 5: how soon all is served again after a daemon's death, and how soon a worker is there.

Of the daemon: from kill -9 until a worker has acquired every expert, with an fd store and without.
Of a worker: from the call that loads the model until the first token, beside transformers' own
loading of the same checkpoint from the page cache; each in a process of its own, imports apart.
"""

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, MixtralConfig
from xxhash import xxh3_64_intdigest

from bench.figures import Bench, Figure, compared, timed
from bench.page_cache import write_out
from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_client import Client
from expertd_testing.daemon import serving
from expertd_testing.handmade import make_pack
from expertd_testing.supervised import Supervised, supervised
from expertd_testing.tiny_models import _COMMON, CONFIGS, byte_tokenizer

_RECORD_BYTES = 1728 << 10
_ADOPTED = re.compile(r"model adopted model=m records=(\d+) bytes=(\d+) .*?seconds=([\d.]+)")
_MAX_ROUNDS = 5
_QUICK_BYTES = 64 << 20
# 8 layers of Mixtral's proportions at a quarter of its width: 1.6 GB, a tenth of it the trunk.
_SHAPE = {
    "hidden_size": 1024,
    "intermediate_size": 3584,
    "num_hidden_layers": 8,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
_QUICK_SHAPE = {
    "hidden_size": 256,
    "intermediate_size": 896,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 257,
}

_LOAD = """
import json, sys, time
import torch
from transformers import AutoModelForCausalLM
from expertd_inference import load_model

torch.set_grad_enabled(False)
how, place = sys.argv[1:]
ids = torch.tensor([[1, 2, 3]])
began = time.perf_counter()
if how == "stock":
    model = AutoModelForCausalLM.from_pretrained(place)
else:
    model = load_model("m", socket=place)
loaded = time.perf_counter()
model(ids)
print(json.dumps({"loaded": loaded - began, "token": time.perf_counter() - began}))
"""


def measure(bench: Bench) -> Iterator[Figure]:
    """The daemon's restart, then a worker's."""
    yield from _daemon(bench)
    yield from _worker(bench)


def _daemon(bench: Bench) -> Iterator[Figure]:
    experts = max(8, bench.pack_bytes // 4 // _RECORD_BYTES)
    num_bytes = 4 * experts * _RECORD_BYTES
    bench.say("restart: making a pack")
    handmade = make_pack(
        bench.folder / "handmade", layers=4, experts=experts, record_bytes=_RECORD_BYTES
    )
    write_out(handmade)
    turns, rates = [], []
    direct = ["--disk-io", "direct"]
    with (
        supervised({"m": handmade}, ram=num_bytes) as warm,
        supervised({"m": handmade}, ram=num_bytes, max_stored=0, arguments=direct) as cold,
    ):
        for service in (warm, cold):
            _use_all(service)
        for number in range(min(bench.rounds, _MAX_ROUNDS)):
            bench.say(f"restart: kill -9, {number + 1}")
            turns.append((_back_after(warm), _back_after(cold)))
            (*_, told) = _ADOPTED.finditer(warm.output)
            rates.append((int(told[2]) / float(told[3]) / 2**30, _plain_rate(num_bytes)))
    size = f"{num_bytes / 2**30:.2f} GiB"
    yield compared("restart", f"kill -9 until {size} are served, warm / cold", "s", turns)
    yield compared("restart", "verifying what is adopted / XXH3 on all cores", "GiB/s", rates)


def _back_after(service: Supervised) -> float:
    """Seconds from the daemon's death until every expert has been acquired from the next."""
    starts = len(service.runs)
    began = time.perf_counter()
    service.kill()
    service.wait_ready(starts=starts + 1)
    _use_all(service)
    return time.perf_counter() - began


def _use_all(service: Supervised) -> None:
    with Client(service.socket) as store, store.attach("m") as session:
        for layer in session.model.layers.values():
            session.acquire(layer.layer, range(layer.num_experts)).release()


def _plain_rate(num_bytes: int) -> float:
    """GiB/s of the checksum over memory of this process, in batches like the daemon's."""
    step = 64 << 20
    memory = memoryview(bytearray(num_bytes))
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = [memory[start : start + step] for start in range(0, num_bytes, step)]
        seconds = timed(lambda: list(pool.map(xxh3_64_intdigest, parts)))
    return num_bytes / seconds / 2**30


def _worker(bench: Bench) -> Iterator[Figure]:
    quick = bench.pack_bytes < _QUICK_BYTES
    bench.say("restart: making a checkpoint and its pack")
    checkpoint, packed = bench.folder / "checkpoint", bench.folder / "pack"
    _make(checkpoint, packed, _QUICK_SHAPE if quick else _SHAPE)
    experts = _num_bytes(packed, "experts-*")
    share = _num_bytes(packed, "trunk.*") / _num_bytes(checkpoint, "*.safetensors")
    loads, tokens = [], []
    with serving({"m": packed}, ram=experts, socket=bench.folder / "s") as daemon:
        with Client(daemon.socket) as store, store.attach("m") as session:
            for layer in session.model.layers.values():
                session.acquire(layer.layer, range(layer.num_experts)).release()
        for number in range(1 if quick else min(bench.rounds, _MAX_ROUNDS)):
            bench.say(f"restart: a worker, {number + 1}")
            ours = _run(_LOAD, "expertd", daemon.socket)
            stock = _run(_LOAD, "stock", checkpoint)
            loads.append((ours["loaded"], stock["loaded"]))
            tokens.append((ours["token"], stock["token"]))
    of = f" (trunk: {100 * share:.0f} % of the bytes)"
    yield compared("restart", f"worker's load_model / from_pretrained{of}", "s", loads)
    yield compared("restart", "worker's load and first token / stock", "s", tokens)


def _make(checkpoint: Path, folder: Path, shape: Mapping[str, int]) -> None:
    """Of random weights, and without tensors beside the model's own."""
    config = MixtralConfig(**{**_COMMON, **CONFIGS["mixtral"][1], **shape})
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model = model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-0.03, 0.03)
    model.save_pretrained(checkpoint)
    byte_tokenizer().save_pretrained(checkpoint)
    pack(Request(checkpoint, folder, choose_scheme("bf16", None, None)))


def _num_bytes(folder: Path, pattern: str) -> int:
    return sum(path.stat().st_size for path in folder.glob(pattern))


def _run(script: str, *arguments: object) -> dict[str, float]:
    """Runs it in a process of its own; the figures that it prints, if any."""
    done = subprocess.run(
        [sys.executable, "-c", script, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )
    if done.returncode:
        raise RuntimeError(done.stderr)
    figures: dict[str, float] = json.loads(done.stdout) if done.stdout.strip() else {}
    return figures
