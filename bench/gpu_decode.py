"""The paper's ablation: decoding with all of it, without speculation, without a cache, naively.

Each row of :mod:`bench.gpu_ways` is tokens per second beside the row's own bound: what the link
needs for the bytes that were copied, the GPU's memory for the bytes that were read, or launching
for the kernels that a token takes, whichever is longest.
"""

from collections.abc import Iterator
from pathlib import Path

from bench.figures import compared, counted
from bench.gpu_decoder import Decoded, Decoder
from bench.gpu_figures import GpuFigure, of_gpu
from bench.gpu_rig import OutOfTimeError, Rig
from bench.gpu_ways import BUDGETS, MIDDLE, NO_CACHE, WAYS, Way
from expertd_client import Session
from expertstore.errors import ExpertdError

PART = "decode"
GOAL_OF_BOUND = 0.85
GOAL_OF_LINK = 0.95
GOAL_CACHED = 100.0


def measure(rig: Rig, shape: str, pack: Path, session: Session) -> Iterator[GpuFigure]:
    """Each way with each budget; what does not depend on the budget, once."""
    rig.need(30)
    decoder = Decoder(rig, shape, pack, session)
    manifest = decoder.manifest
    done: set[tuple[str, int]] = set()
    for budget in BUDGETS:
        for way in WAYS:
            settings = way.device_settings(manifest, budget, fake=rig.fake)
            # A budget that holds everything is the same as a larger one.
            key = (way.name, min(settings.cache_bytes or 0, manifest.expert_bytes))
            if key in done or ((rig.fake or way.once) and budget != MIDDLE):
                continue
            done.add(key)
            title = f"{shape}, {way.name}"
            try:
                rig.need(15)
                rig.say(title)
                decoded = decoder.decode(settings, staged=way.staged, cache_tokens=way.cache_tokens)
                cached = decoded.cached(settings.cache_bytes or 0, manifest.expert_bytes)
                yield from _figures(f"{title}, {cached}", way, decoded, decoder.rates.link)
            except OutOfTimeError:
                raise
            except (ExpertdError, RuntimeError) as error:
                rig.say(f"{title}: failed: {str(error).splitlines()[0]}")


def _figures(title: str, way: Way, decoded: Decoded, link: float) -> Iterator[GpuFigure]:
    speed, state = decoded.tokens_per_second, decoded.state
    goal = GOAL_OF_BOUND if way.best else None
    what = f"{title}: {decoded.hits:.0%} hits, {decoded.copied_bytes / 1e6:.0f} MB a token"
    yield of_gpu(
        compared(PART, what, "tokens/s", [(speed, 1 / decoded.bound.seconds)], at_least=goal),
        arena=state.arena,
        steps=state.steps,
        bound=decoded.bound.by,
    )
    if way.name == NO_CACHE.name:
        rates = [(decoded.copied_bytes * speed / 1e9, link / 1e9)]
        yield of_gpu(
            compared(
                PART, f"{title}: copies while misses last", "GB/s", rates, at_least=GOAL_OF_LINK
            ),
            arena=state.arena,
            steps=state.steps,
            bound="link",
        )
    if way.best and "30b-a3b" in title and "all cached" in title:
        yield of_gpu(
            counted(PART, f"{title}: the goal", "tokens/s", [speed], at_least=GOAL_CACHED),
            arena=state.arena,
            steps=state.steps,
        )
