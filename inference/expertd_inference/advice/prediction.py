"""Tokens per second and RAM, from what was measured: plain values in, plain values out.

A token takes the time of its matrices in the kernels, what else a token costs, and for each layer
that misses an expert a call to the daemon and the reading of what is missing. Several workers
share the memory's rate, the cores and the disk. What hints hide of the reading is not counted:
where they help at all it is less than that.

On a GPU it is a bound: a token's misses over the link, or all its bytes from the GPU's memory,
whichever takes longer, and nothing else.
"""

import math
from dataclasses import dataclass
from enum import StrEnum

from expertd_inference.advice.hit_rates import Routing, hit_rate
from expertd_inference.advice.values import Gpu, Host, Need, Reading

CONTEXT = 4096
"""Tokens whose keys and values are counted in a worker's memory."""


class Processor(StrEnum):
    """Where experts are computed."""

    CPU = "cpu"
    GPU = "gpu"


@dataclass(frozen=True)
class Costs:
    """Seconds of a token of one scheme on this host, measured."""

    kernel_seconds: float
    """That its matrices take in the kernels, with nobody else at work."""
    other_seconds: float
    """Of all else, the calls of the kernels included, with every expert in RAM."""
    call_seconds: float
    """Of a call to the daemon."""
    reading: Reading


@dataclass(frozen=True)
class Prediction:
    """One scheme with one budget. Tokens per second are of each worker."""

    scheme: str
    processor: Processor
    share: float
    """Of the experts that the budget holds."""
    budget_bytes: int
    """For experts: what ``--ram`` is given, or on a GPU ``--cache-bytes``."""
    ram_bytes: int
    """Of the host: experts, trunk, and all workers."""
    fits: bool
    typical: float
    """Tokens per second if experts are asked for as trained models do."""
    worst: float
    """If each is as likely as every other."""
    read_bytes: float
    """From disk, or over the link, per token, typically."""


def predict(
    need: Need, costs: Costs, host: Host, budget_bytes: int, worker_bytes: int
) -> Prediction:
    """Workers on the CPU, experts in ``budget_bytes`` of RAM; ``worker_bytes`` are each one's."""
    share = min(1.0, budget_bytes / need.expert_bytes)
    budget = min(budget_bytes, need.expert_bytes)
    ram = budget + need.rows_bytes(budget) + need.trunk_bytes + host.workers * worker_bytes
    typical = token_seconds(need, costs, host, hit_rate(share, Routing.TYPICAL))
    worst = token_seconds(need, costs, host, hit_rate(share, Routing.UNIFORM))
    missed = need.working_set_bytes * (1 - hit_rate(share, Routing.TYPICAL))
    return Prediction(
        need.scheme,
        Processor.CPU,
        share,
        budget,
        ram,
        ram <= host.ram_bytes,
        1 / typical,
        1 / worst,
        missed,
    )


def predict_gpu(need: Need, host: Host, gpu: Gpu, worker_bytes: int) -> Prediction | None:
    """One worker on the GPU, all experts in RAM: a bound. None if the GPU has no room for it."""
    room = gpu.memory_bytes - need.trunk_bytes
    if room < need.working_set_bytes:
        return None
    cache = min(room, need.expert_bytes)
    share = cache / need.expert_bytes
    read = 0.0 if gpu.memory_rate is None else need.token_bytes / gpu.memory_rate
    speeds = {}
    for routing in Routing:
        missed = need.working_set_bytes * (1 - hit_rate(share, routing))
        seconds = max(missed / gpu.link_rate, read)
        speeds[routing] = 1 / seconds if seconds else math.inf
    rows = need.rows_bytes(need.expert_bytes)
    ram = need.expert_bytes + rows + need.trunk_bytes + worker_bytes
    return Prediction(
        need.scheme,
        Processor.GPU,
        share,
        cache,
        ram,
        ram <= host.ram_bytes,
        speeds[Routing.TYPICAL],
        speeds[Routing.UNIFORM],
        need.working_set_bytes * (1 - hit_rate(share, Routing.TYPICAL)),
    )


def token_seconds(need: Need, costs: Costs, host: Host, hit: float) -> float:
    """Of one token of one worker, where each of its experts is in RAM with probability ``hit``."""
    crowd = max(1.0, host.workers * host.threads / host.cores)
    # What all read together, they share; and a core that two want, too.
    share = host.workers * host.memory_rate / host.memory_rate_all
    compute = costs.kernel_seconds * max(1.0, crowd, share) + costs.other_seconds * crowd
    waiting = 0.0
    for group in need.experts:
        scale = group.layout.record_bytes / need.max_record_bytes
        for num, probability in enumerate(binomial(group.top_k, 1 - hit)):
            if num:
                read = scale * costs.reading.seconds(num) * host.workers
                waiting += group.count * probability * (costs.call_seconds * crowd + read)
    return compute + waiting


def binomial(count: int, probability: float) -> list[float]:
    """The probabilities of 0 to ``count`` of so many happening."""
    return [
        math.comb(count, num) * probability**num * (1 - probability) ** (count - num)
        for num in range(count + 1)
    ]
