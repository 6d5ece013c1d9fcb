"""Probes the host for a model, and predicts each scheme and budget."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from expertd_inference.advice import host as hosts
from expertd_inference.advice import probes
from expertd_inference.advice.busy import busy_warning, read_cpu_times
from expertd_inference.advice.kernel_times import KernelTimes, memory_bytes
from expertd_inference.advice.models import Model
from expertd_inference.advice.prediction import CONTEXT, Costs, Prediction, predict, predict_gpu
from expertd_inference.advice.recommendation import Recommendation, recommend
from expertd_inference.advice.twin import Twin, measure_twin
from expertd_inference.advice.values import Gpu, Host, Need, Reading
from expertstore.errors import InvalidInputError
from expertstore.shared.host_memory import memory_available
from expertstore.sizes import format_bytes, size_to_give

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
    recommendation: Recommendation
    busy: str | None = None
    """What to be told if others used the host meanwhile."""


@dataclass(frozen=True)
class Measured:
    """What a host does with some models' matrices, and with one model's twin."""

    host: Host
    twin: Twin
    kernel_seconds: Mapping[Need, float]
    readings: Mapping[str, Reading]
    """By the names that were given to the kinds of records."""
    busy: str | None

    @property
    def worker_bytes(self) -> int:
        """Of a worker, without the keys and values of its context."""
        return self.twin.worker_bytes

    def costs(self, need: Need, reading: Reading, scale: float) -> Costs:
        """Of a token of a model with ``scale`` times the twin's layers."""
        # The twin's own calls are part of what a token costs besides, and so are not counted
        # again: what is left is what the matrices' size adds.
        narrow = scale * self.kernel_seconds[self.twin.need]
        return Costs(
            max(0.0, self.kernel_seconds[need] - narrow),
            scale * self.twin.token_seconds,
            self.twin.call_seconds,
            reading,
        )


def advise(model: Model, question: Question, say: Callable[[str], None]) -> Advice:
    """Measures for some seconds, and predicts; ``say`` hears of each result as it comes.

    Sets torch's number of threads. Raises InvalidInputError if the budget is too small, or there
    is no disk to measure; ExpertdError if nothing can be served here.
    """
    budgets = _budgets(model, question.ram_bytes)
    gpu = _gpu(question)
    if gpu is not None:
        say(f"GPU: {format_bytes(gpu.memory_bytes)}, link {gpu.link_rate / 1e9:.1f} GB/s")
    kinds = {
        need.scheme: (need.max_record_bytes, max(group.top_k for group in need.experts))
        for need in model.needs
    }
    directory = question.directory or model.pack or Path.cwd()
    measured = measure(model.needs, model.config, directory, kinds, question, say)
    host = replace(measured.host, gpu=gpu)
    scale = measured.twin.layer_scale
    besides = scale * measured.twin.token_seconds
    say(f"a token of {model.name}: {besides * 1e3:.1f} ms, and what its matrices take")
    costs = {
        need.scheme: measured.costs(need, measured.readings[need.scheme], scale)
        for need in model.needs
    }
    worker_bytes = measured.worker_bytes + CONTEXT * model.kv_bytes
    rows: list[Prediction] = []
    for need in model.needs:
        rows += [
            predict(need, costs[need.scheme], host, budget, worker_bytes)
            for budget in budgets.get(need.scheme, ())
        ]
        if gpu is not None and (row := predict_gpu(need, host, gpu, worker_bytes)) is not None:
            rows.append(row)
    recommendation = recommend(model.name, rows, model.needs, host.ram_bytes)
    return Advice(model, host, costs, tuple(rows), recommendation, measured.busy)


def measure(
    needs: Sequence[Need],
    config: dict[str, Any],
    directory: Path,
    kinds: Mapping[str, tuple[int, int]],
    question: Question,
    say: Callable[[str], None],
) -> Measured:
    """Measures the disk of ``directory``, the twin of ``config``, and the matrices of all needs.

    ``kinds``: by names, bytes of a record and how many a layer asks for at once. Sets torch's
    number of threads.
    """
    before, (load, _, _) = read_cpu_times(), os.getloadavg()
    threads = question.threads or hosts.num_cores()
    torch.set_num_threads(threads)
    storage_rate, readings = hosts.readings(directory, kinds, say)
    say(f"disk of {directory}: {storage_rate / 1e9:.1f} GB/s")
    twin = measure_twin(config, say)
    num_bytes = max(probes.MEMORY_BYTES, threads * probes.BYTES_PER_THREAD, memory_bytes(needs))
    with probes.MemoryProbe(threads, say=say, num_bytes=num_bytes) as memory:
        memory_rate = memory.rate(0.2)
        say(f"memory: {memory_rate / 1e9:.1f} GB/s with {threads} threads")
        times = KernelTimes(memory, [*needs, twin.need])
        times.run(1.5)
        memory_rate = (memory_rate + memory.rate(0.1)) / 2
        kernel_seconds = {need: times.seconds(need) for need in [*needs, twin.need]}
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
    )
    busy = busy_warning(before, read_cpu_times(), load)
    return Measured(host, twin, kernel_seconds, readings, busy)


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
            f"{format_bytes(least.working_set_bytes)} of experts in {least.scheme}; give --ram "
            f"{size_to_give(least.working_set_bytes)} or more."
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
