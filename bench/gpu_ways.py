"""The ways to decode that are compared: the paper's ablation, recorded steps, a CPU share.

- *full*: cache, speculation one layer ahead
- *no speculation*: the cache alone
- *no cache*: room for one layer's experts, so that nearly every use is a copy
- *naive*: the same, by way of a pinned buffer instead of DMA from the shared memory
- *segments*, *whole*: as *full* and *no speculation*, with steps recorded as CUDA graphs
- *whole, long cache*: with room for 8,192 tokens' keys and values instead of 1,024
- *CPU share*: as *no speculation*, with misses split between link and CPU
- *... sequences*: several that go on in each step, by segments, whole or, as *modules*, by the
  model's modules as in *full*
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from bench.gpu_decoder import CACHE_TOKENS, LONG_CACHE_TOKENS
from expertd_inference.settings import DecodeGraphsMode, DeviceSettings, OnMiss
from expertstore.pack.manifest import Manifest

GIB = 1 << 30
BUDGETS = (24 * GIB, 12 * GIB, 6 * GIB)
MIDDLE = BUDGETS[1]
_FAKE_ALL = 17 * GIB
"""On the fake device a budget is the share that it would be of a model of this size."""
_OFF = {"decode_graphs": DecodeGraphsMode.OFF}
_NO_SPECULATION = {"speculate_layers": 0}


@dataclass(frozen=True)
class Way:
    """A row of the ablation; ``no_cache`` is of one layer's experts."""

    name: str
    settings: Mapping[str, Any]
    no_cache: bool = False
    staged: bool = False
    cache_tokens: int = CACHE_TOKENS
    """Room for keys and values, where steps are recorded."""
    num_sequences: int = 1
    """So many go on in each step."""
    once: bool = False
    """With the middle budget alone: ten minutes are short."""
    best: bool = False
    """It is to come near its bound."""

    def device_settings(self, manifest: Manifest, budget: int, *, fake: bool) -> DeviceSettings:
        """With ``budget`` bytes for experts; on the fake as large a share of its small ones."""
        settings = DeviceSettings(cache_bytes=budget, on_miss=OnMiss.COPY)
        settings = replace(settings, **self.settings)
        if self.no_cache:
            room = max(layer.experts_per_token for layer in manifest.layers)
            return replace(settings, cache_bytes=room * manifest.max_record_bytes)
        if fake:
            # A whole step needs room for one token's experts of each layer.
            least = manifest.working_set_bytes + settings.num_staging * manifest.max_record_bytes
            share = int(manifest.expert_bytes * min(1, budget / _FAKE_ALL))
            return replace(settings, cache_bytes=max(least, share))
        return settings


FULL = Way("full", _OFF, best=True)
NO_SPECULATION = Way("no speculation", {**_OFF, **_NO_SPECULATION})
NO_CACHE = replace(NO_SPECULATION, name="no cache", no_cache=True)
SEGMENTS = Way("segments", {"decode_graphs": DecodeGraphsMode.SEGMENTS}, once=True, best=True)
WHOLE = Way("whole", {"decode_graphs": DecodeGraphsMode.WHOLE, **_NO_SPECULATION}, best=True)
LONG = replace(WHOLE, name="whole, long cache", cache_tokens=LONG_CACHE_TOKENS, once=True)
UNGUESSED_SEGMENTS = replace(
    SEGMENTS,
    name="segments, no speculation",
    settings={**SEGMENTS.settings, **_NO_SPECULATION},
)
CPU_SHARE = Way("CPU share", {"on_miss": OnMiss.AUTO, **_OFF, **_NO_SPECULATION}, once=True)

BATCHES = (4, 8, 16)
BATCHED_SEGMENTS, BATCHED_WHOLE, BATCHED_MODULES = (
    [replace(way, name=f"{way.name}, {num} sequences", num_sequences=num) for num in BATCHES]
    for way in (SEGMENTS, WHOLE, replace(FULL, name="modules"))
)

WAYS = (
    FULL,
    NO_SPECULATION,
    NO_CACHE,
    replace(NO_CACHE, name="naive", staged=True),
    SEGMENTS,
    WHOLE,
    LONG,
    CPU_SHARE,
)
"""With every budget, but for those that say otherwise."""

TELLING = (
    (WHOLE, 24 * GIB, True),
    (WHOLE, 6 * GIB, False),
    (FULL, 6 * GIB, True),
    (SEGMENTS, 6 * GIB, False),
    *((way, 24 * GIB, False) for way in (*BATCHED_SEGMENTS, BATCHED_MODULES[-1])),
    *((way, 24 * GIB, False) for way in (BATCHED_WHOLE[0], *BATCHED_MODULES[:-1])),
    (NO_SPECULATION, 24 * GIB, False),
    (LONG, 24 * GIB, True),
    (CPU_SHARE, 6 * GIB, False),
    (UNGUESSED_SEGMENTS, 6 * GIB, False),
    (WHOLE, 12 * GIB, False),
)
"""A few, the most telling first, for a run that may be cut short; whether each is profiled."""
FAKE_TELLING = (
    *TELLING[:2],
    (SEGMENTS, 6 * GIB, False),
    (BATCHED_SEGMENTS[0], 24 * GIB, False),
    (CPU_SHARE, 6 * GIB, False),
)
"""What differs on the fake device, too."""
