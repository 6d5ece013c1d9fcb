"""How often experts are found in a GPU's cache: real routing through the worker's own policy."""

from pathlib import Path

from expertd.traces.replay import HitRates
from expertd_inference.device.cache import Found, SlotCache
from expertd_inference.settings import CachePolicy
from expertstore.trace import Phase, TraceReader


def hit_rates(trace: Path, share: float, policy: CachePolicy) -> HitRates:
    """With slots for ``share`` of the model's experts, empty at first; nothing is guessed."""
    hits, accesses = dict.fromkeys(Phase, 0), dict.fromkeys(Phase, 0)
    with TraceReader(trace) as reader:
        layers = dict(zip(reader.model.layer_ids, reader.model.num_experts, strict=True))
        cache = SlotCache(int(reader.model.num_entries * share + 1e-9), 0, layers, policy)
        # A trace may have a prompt's tokens layer by layer or token by token; a step is a step.
        for row in sorted(reader, key=lambda row: row.step):
            layer = reader.model.layer_ids[row.layer]
            cache.begin_layer(layer)
            # A row of more than there are slots goes in waves, as a prompt's would.
            for start in range(0, len(row.experts), cache.num_slots):
                wave = sorted(row.experts[start : start + cache.num_slots])
                placed = cache.assign(layer, wave)
                cache.release()
                hits[row.phase] += sum(place.found is Found.CACHED for place in placed)
                accesses[row.phase] += len(placed)
    decoded = accesses[Phase.DECODE]
    return HitRates(
        hits[Phase.DECODE] / decoded if decoded else None,
        sum(hits.values()) / sum(accesses.values()),
    )
