"""How often experts are found in a GPU's cache: real routing through the real policy.

::

    python -m bench.device_cache traces/*.csv [--json]

Hit rates of decoding, after the trace's own prefill; a hit rate is no throughput.
"""

import json
import sys
from pathlib import Path

from expertd.traces.trace import Phase, TraceReader
from expertd_inference.device.cache import Found, SlotCache
from expertd_inference.settings import CachePolicy

SHARES = (0.05, 0.10, 0.25, 0.50)


def hit_rate(trace: Path, share: float, policy: CachePolicy) -> float:
    """Of decoding, with slots for ``share`` of the model's experts."""
    hits = accesses = 0
    with TraceReader(trace) as reader:
        layers = dict(zip(reader.model.layer_ids, reader.model.num_experts, strict=True))
        cache = SlotCache(int(reader.model.num_entries * share), 0, layers, policy)
        # A trace may have a prompt's tokens layer by layer or token by token; a step is a step.
        for row in sorted(reader, key=lambda row: (row.phase is Phase.DECODE, row.step)):
            layer = reader.model.layer_ids[row.layer]
            cache.begin_layer(layer)
            placed = cache.assign(layer, sorted(set(row.experts)))
            cache.release()
            if row.phase is Phase.DECODE:
                hits += sum(place.found is Found.CACHED for place in placed)
                accesses += len(placed)
    return hits / accesses if accesses else 0.0


def main() -> None:
    """Prints the table, or with ``--json`` its rows."""
    traces = [Path(argument) for argument in sys.argv[1:] if argument != "--json"]
    rows = [
        {
            "trace": trace.stem,
            "share": share,
            **{policy.value: round(hit_rate(trace, share, policy), 3) for policy in CachePolicy},
        }
        for trace in traces
        for share in SHARES
    ]
    if "--json" in sys.argv:
        print(json.dumps(rows))
        return
    print("| trace | share of experts on the GPU | lru | aged |\n|---|---|---|---|")
    for row in rows:
        print("| {trace} | {share:.0%} | {lru:.3f} | {aged:.3f} |".format(**row))


if __name__ == "__main__":
    main()
