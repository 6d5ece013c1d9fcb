"""With ``exact`` a text is the same alone and among others, on real (tiny) models."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from expertd_inference import Engine, EngineLimits, GenerationSettings, Worker
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.process.attachment import attach
from expertd_testing.daemon import serving
from expertstore.pack.manifest import read_manifest
from tests.inference.greedy import prompt_of

Make = Callable[..., Any]

pytestmark = pytest.mark.skipif(native_library().library is None, reason="no native library")

# Every scheme, and architectures with biases, norms of heads, shared experts, windows and sinks.
# The last is the share of the experts in RAM, if a layer's have room in that.
PACKS = [
    ("mixtral", "4bit", 0.25),
    ("qwen3_moe", "8bit", 1),
    ("olmoe", "paper-3bit", 1),
    ("qwen2_moe", "paper-2bit", 1),
    ("gpt_oss_mxfp4", "as-is", 0.25),
    ("mixtral", "bf16", 1),
]


@dataclass(frozen=True)
class Request:
    prompt: list[int]
    settings: GenerationSettings


def requests() -> Iterator[Request]:
    """Prompts of one row and of many, some with a common beginning; greedy, and sampled."""
    begin = prompt_of(130)
    for number, length in enumerate((1, 65)):
        prompt = prompt_of(length, seed=number + 1)
        for temperature in (0.0, 1.0):
            # So long that each needs blocks twice: more than the pool has for all.
            settings = GenerationSettings(
                max_new_tokens=90 + number, temperature=temperature, seed=number, ignore_eos=True
            )
            yield Request(prompt, settings)
        yield Request([*begin, *prompt[:3]], settings)


@pytest.mark.parametrize(("architecture", "scheme", "in_ram"), PACKS)
def test_alone_and_among_others(
    architecture: str, scheme: str, in_ram: float, packed: Make
) -> None:
    pack = packed(architecture, scheme)
    manifest = read_manifest(pack).manifest
    ram = max(int(in_ram * manifest.expert_bytes), manifest.working_set_bytes)
    with (
        serving({"m": pack}, ram=ram) as daemon,
        Worker(attach("m", daemon.socket), exact=True, say=lambda _: None) as worker,
    ):
        texts = {}
        with Engine(worker, EngineLimits(max_sequences=1, kv_tokens=512)) as engine:
            for number, one in enumerate(requests()):
                texts[number] = ids(engine.submit(one.prompt, one.settings))
            assert engine.stats.num_preemptions == 0
        torch.set_num_threads(2)
        try:
            limits = EngineLimits(max_sequences=6, kv_tokens=6 * 64, chunk_rows=1)
            with Engine(worker, limits) as engine:
                streams = [engine.submit(one.prompt, one.settings) for one in requests()]
                for number, stream in enumerate(streams):
                    assert ids(stream) == texts[number], (number, engine.executor)
                stats = engine.stats
        finally:
            torch.set_num_threads(1)
    assert stats.executor != "turns"
    assert stats.rows_mean > 1.5, "sequences share steps"
    assert stats.num_preemptions > 0
    assert stats.prefix_hits > 0 or "one sequence at a time" in stats.reason


def ids(stream: Any) -> list[int]:
    return [token.id for token in stream]
