"""Continues one prompt, streams its text, and counts what it took."""

import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import msgspec

from expertd_inference.device.stats import DeviceStats
from expertd_inference.engine.engine import Prompt
from expertd_inference.experts.hints import HintStats
from expertd_inference.process.memory import PeakPss
from expertd_inference.settings import GenerationSettings

if TYPE_CHECKING:
    from expertd_inference.worker import Worker

StatsT = TypeVar("StatsT", DeviceStats, HintStats)


class GenerationResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was generated and what it took.

    ``text`` has no special tokens; ``tokens`` are the new ids, with the end-of-text token if it
    came to that. ``finish_reason`` is ``stop`` or ``length``, null if it was interrupted.
    ``ttft_seconds`` runs from the prompt's tokens to the first new one (null if there was none);
    ``tokens_per_second`` counts from the first to the last (null below two). ``host_hits``
    and ``nvme_misses`` are the experts found in RAM and those that the daemon had to read,
    ``pack_reads`` those of the latter that this process read from the pack, as the daemon had no
    slot for them, ``remote_misses`` those copied from a daemon whose memory this process cannot
    share, and ``device`` is what moved to GPUs, null on the CPU; these count all that the worker
    computed meanwhile. ``kernels`` are those that the CPU computed with; ``executor`` computed the
    steps, ``reason`` says why that one, and ``rows_mean`` is how many rows a step had in the mean;
    ``native_rows`` is that of EngineStats; ``experts_mean`` is how many experts computed a row of
    a MoE layer;
    ``hints`` is what became of hints to the daemon, null where none are given;
    ``peak_pss_bytes`` is null unless it was asked for.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    new_tokens: int
    finish_reason: str | None
    ttft_seconds: float | None
    tokens_per_second: float | None
    host_hits: int
    nvme_misses: int
    pack_reads: int
    remote_misses: int
    peak_pss_bytes: int | None
    device: DeviceStats | None = None
    kernels: str = ""
    executor: str = ""
    reason: str = ""
    rows_mean: float = 0.0
    experts_mean: float = 0.0
    native_rows: Mapping[str, int | None] = {}
    hints: HintStats | None = None


@dataclass(frozen=True)
class Generation:
    """A result, and whether it was cut short by SIGINT."""

    result: GenerationResult
    interrupted: bool


def generate(
    worker: "Worker",
    prompt: Prompt,
    settings: GenerationSettings | None = None,
    *,
    images: Sequence[bytes] = (),
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
    measure_memory: bool = False,
) -> Generation:
    """Continues ``prompt`` by the worker's engine, or with ``chat`` answers it as a user's message.

    ``images`` are the bytes of files, one for each place that the prompt has for one; those of a
    text that is answered with ``chat`` come before it. ``on_text`` is given the text piece by piece
    as it comes. ``measure_memory`` samples how much memory this process uses, in a thread that
    takes up to a tenth of a core. On SIGINT it returns what there is. Several threads may generate
    at once; their sequences are computed together. Raises as :meth:`Engine.submit` does, PackError
    if the pack's files cannot be used, and what ends a sequence, such as PreconditionError if the
    model's scores are not finite.
    """
    if chat and isinstance(prompt, str):
        content = [*[{"type": "image"}] * len(images), {"type": "text", "text": prompt}]
        prompt = [{"role": "user", "content": content if images else prompt}]
    engine = worker.engine
    tokens = engine.encode(prompt)
    count = _CountsBefore(worker)
    ids: list[int] = []
    times: list[float] = []
    text = ""
    interrupted = False
    memory = PeakPss() if measure_memory else None
    with memory or nullcontext():
        began = time.perf_counter()
        with engine.submit(tokens, settings, images=images) as stream:
            try:
                for token in stream:
                    times.append(time.perf_counter())
                    ids.append(token.id)
                    text += token.text
                    if on_text is not None and token.text:
                        on_text(token.text)
            except KeyboardInterrupt:
                interrupted = True
    result = GenerationResult(
        text=text,
        tokens=ids,
        prompt_tokens=stream.num_prompt_tokens,
        new_tokens=len(ids),
        finish_reason=stream.finish_reason,
        ttft_seconds=times[0] - began if times else None,
        tokens_per_second=(len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else None,
        peak_pss_bytes=None if memory is None else memory.peak_bytes,
        **count.since(),
    )
    return Generation(result, interrupted)


class _CountsBefore:
    """What a worker had counted when this was made."""

    _OF_THE_SESSION = ("host_hits", "nvme_misses", "pack_reads", "remote_misses")

    def __init__(self, worker: "Worker") -> None:
        self._worker = worker
        self._session = {name: getattr(worker.session, name) for name in self._OF_THE_SESSION}
        self._device, self._hints = worker.device_stats, worker.hint_stats
        self._engine = worker.engine.stats

    def since(self) -> dict[str, Any]:
        """What was counted after that, by the names of GenerationResult."""
        worker, before, now = self._worker, self._engine, self._worker.engine.stats
        num_steps = now.num_steps - before.num_steps
        return {
            **{name: getattr(worker.session, name) - old for name, old in self._session.items()},
            "device": _since(self._device, worker.device_stats),
            "hints": _since(self._hints, worker.hint_stats),
            "kernels": worker.kernels.name,
            "executor": now.executor,
            "reason": now.reason,
            "rows_mean": (now.num_rows - before.num_rows) / num_steps if num_steps else 0.0,
            "experts_mean": now.experts_mean_since(before),
            "native_rows": now.native_rows,
        }


def _since(before: StatsT | None, now: StatsT | None) -> StatsT | None:
    return None if before is None or now is None else now.since(before)
