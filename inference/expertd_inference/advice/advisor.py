"""Probes the host for a model, and predicts each scheme and budget."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from expertd.errors import InvalidInputError
from expertd.shared.host_memory import memory_available
from expertd.sizes import format_bytes
from expertd_inference import probes
from expertd_inference.advice import host as hosts
from expertd_inference.advice.choice import Choice, choose
from expertd_inference.advice.kernel_times import KernelTimes, memory_bytes
from expertd_inference.advice.models import Model
from expertd_inference.advice.prediction import CONTEXT, Costs, Prediction, predict, predict_gpu
from expertd_inference.advice.twin import measure_twin
from expertd_inference.advice.values import Gpu, Host, Need

SHARES = (1.0, 0.5, 0.25)
"""Of the experts in RAM, unless a budget is given."""
GPU_RESERVE_BYTES = 1 << 30
"""Of a GPU's memory, for what is neither trunk nor experts."""


@dataclass(frozen=True)
class Question:
    """What is asked of the host. ``None``: find out, or try several."""

    directory: Path | None = None
    """Where packs are to lie; by default where the model is, or here."""
    ram_bytes: int | None = None
    """For experts."""
    gpu_memory_bytes: int | None = None
    link_rate: float | None = None
    """Bytes per second, instead of measuring it."""
    workers: int = 1
    threads: int | None = None
    """Of each worker; by default as many as there are cores."""


@dataclass(frozen=True)
class Advice:
    """All that was measured and follows from it."""

    model: Model
    host: Host
    costs: dict[str, Costs]
    """By scheme."""
    rows: tuple[Prediction, ...]
    choice: Choice


def advise(model: Model, question: Question, say: Callable[[str], None]) -> Advice:
    """Measures for some seconds, and predicts; ``say`` hears of each result as it comes.

    Sets torch's number of threads. Raises InvalidInputError if the budget is too small, or there
    is no disk to measure; ExpertdError if nothing can be served here.
    """
    budgets = _budgets(model, question.ram_bytes)
    gpu = _gpu(question)
    threads = question.threads or hosts.num_cores()
    torch.set_num_threads(threads)
    directory = question.directory or model.pack or Path.cwd()
    kinds = {
        need.scheme: (need.max_record_bytes, max(group.top_k for group in need.experts))
        for need in model.needs
    }
    storage_rate, readings = hosts.readings(directory, kinds, say)
    say(f"disk of {directory}: {storage_rate / 1e9:.1f} GB/s")
    if gpu is not None:
        say(f"GPU: {format_bytes(gpu.memory_bytes)}, link {gpu.link_rate / 1e9:.1f} GB/s")
    twin = measure_twin(model.config, say)
    num_bytes = max(
        probes.MEMORY_BYTES, threads * probes.BYTES_PER_THREAD, memory_bytes(model.needs)
    )
    with probes.MemoryProbe(threads, say=say, num_bytes=num_bytes) as memory:
        memory_rate = memory.rate(0.2)
        say(f"memory: {memory_rate / 1e9:.1f} GB/s with {threads} threads")
        times = KernelTimes(memory, [*model.needs, twin.need])
        times.run(1.5)
        memory_rate = (memory_rate + memory.rate(0.1)) / 2
        # The twin's own calls are part of what a token costs besides, and so are not counted
        # again: what is left is what the matrices' size adds.
        narrow = twin.layer_scale * times.seconds(twin.need)
        kernels = {need.scheme: max(0.0, times.seconds(need) - narrow) for need in model.needs}
    besides = twin.layer_scale * twin.token_seconds
    say(f"a token of {model.name}: {besides * 1e3:.1f} ms, and what its matrices take")
    together = min(hosts.num_cores(), question.workers * threads)
    everyone = memory_rate
    if together != threads:
        everyone = probes.memory_read_rate(together, 0.2, say=say)
    host = Host(
        cores=hosts.num_cores(),
        threads=threads,
        workers=question.workers,
        memory_rate=memory_rate,
        memory_rate_all=everyone,
        ram_bytes=memory_available(),
        storage_rate=storage_rate,
        storage=directory,
        disk_free_bytes=hosts.disk_free(directory),
        gpu=gpu,
    )
    costs = {
        need.scheme: Costs(
            kernels[need.scheme],
            besides,
            twin.call_seconds,
            readings[need.scheme],
        )
        for need in model.needs
    }
    worker_bytes = twin.worker_bytes + CONTEXT * model.kv_bytes
    rows: list[Prediction] = []
    for need in model.needs:
        rows += [
            predict(need, costs[need.scheme], host, budget, worker_bytes)
            for budget in budgets.get(need.scheme, ())
        ]
        if gpu is not None and (row := predict_gpu(need, host, gpu, worker_bytes)) is not None:
            rows.append(row)
    return Advice(
        model, host, costs, tuple(rows), choose(model.name, rows, model.needs, host.ram_bytes)
    )


def _budgets(model: Model, ram_bytes: int | None) -> Mapping[str, Sequence[int]]:
    """By scheme; none for one of which a token uses more than the budget."""
    if ram_bytes is None:
        return {
            need.scheme: sorted(
                {max(need.working_set_bytes, int(share * need.expert_bytes)) for share in SHARES},
                reverse=True,
            )
            for need in model.needs
        }
    budgets = {
        need.scheme: (ram_bytes,) for need in model.needs if ram_bytes >= need.working_set_bytes
    }
    if not budgets:
        least: Need = min(model.needs, key=lambda need: need.working_set_bytes)
        raise InvalidInputError(
            f"--ram is {format_bytes(ram_bytes)}, and one token of {model.name} uses "
            f"{format_bytes(least.working_set_bytes)} of experts in {least.scheme}; give that "
            "much at least."
        )
    return budgets


def _gpu(question: Question) -> Gpu | None:
    link = question.link_rate or probes.link_rate()
    memory = question.gpu_memory_bytes
    if memory is None:
        free = probes.gpu_memory()
        memory = None if free is None else free - GPU_RESERVE_BYTES
    if link is None:
        if question.gpu_memory_bytes is not None:
            raise InvalidInputError(
                "--gpu-memory: there is no GPU here whose link could be measured; give its rate "
                "by --link-rate, as in 25GB."
            )
        return None
    if memory is None or memory < 1:
        return None
    return Gpu(memory, link, probes.gpu_memory_rate())
