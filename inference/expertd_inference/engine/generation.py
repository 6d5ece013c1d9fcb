"""Generates text from a prompt, streams it, and counts what it took."""

import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import torch
import transformers
from torch import Tensor

from expertd_inference.device.stats import DeviceStats
from expertd_inference.engine.streaming import TokenStreamer
from expertd_inference.execution.decoding import Decoding
from expertd_inference.experts.hints import HintStats
from expertd_inference.model.generation_config import GENERATION_CONFIG, generation_arguments
from expertd_inference.model.pack_config import context_tokens
from expertd_inference.model.prompts import encode
from expertd_inference.process.memory import PeakPss
from expertd_inference.process.reasons import reason_of
from expertd_inference.settings import GenerationSettings
from expertd_inference.worker import Worker
from expertstore.errors import PackError

StatsT = TypeVar("StatsT", DeviceStats, HintStats)


class GenerationResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was generated and what it took.

    ``tokens`` are the new ids, with the end-of-text token if it came to that. ``ttft_seconds``
    runs from the prompt's tokens to the first new one (null if there was none);
    ``tokens_per_second`` counts from the first to the last (null below two). ``host_hits``
    and ``nvme_misses`` are the experts found in RAM and those that the daemon had to read,
    ``pack_reads`` those of the latter that this process read from the pack, as the daemon had no
    slot for them, ``remote_misses`` those copied from a daemon whose memory this process cannot
    share;
    ``device`` is what moved to GPUs, null on the CPU; ``kernels`` are those that the CPU
    computed with; ``decoding`` is how its tokens after the second came: by a ``program``, or by
    the model's ``modules`` and why (empty with fewer tokens); ``hints`` is what became of hints
    to the daemon, null where none are given; ``peak_pss_bytes`` is null unless it was asked for.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    new_tokens: int
    ttft_seconds: float | None
    tokens_per_second: float | None
    host_hits: int
    nvme_misses: int
    pack_reads: int
    remote_misses: int
    peak_pss_bytes: int | None
    device: DeviceStats | None = None
    kernels: str = ""
    decoding: str = ""
    hints: HintStats | None = None


@dataclass(frozen=True)
class Generation:
    """A result, and whether it was cut short by SIGINT."""

    result: GenerationResult
    interrupted: bool


def generate(
    worker: Worker,
    prompt: str,
    settings: GenerationSettings | None = None,
    *,
    chat: bool = False,
    on_text: Callable[[str], None] | None = None,
    measure_memory: bool = False,
) -> Generation:
    """Continues ``prompt``, or with ``chat`` answers it in the model's chat template.

    ``on_text`` is given the text piece by piece as it comes. ``measure_memory`` samples how much
    memory this process uses, in a thread that takes up to a tenth of a core. On SIGINT it
    returns what there is. Raises InvalidInputError for a prompt that has no tokens or fills the
    model's context, or with ``chat`` if the model has no template, and for what the pack's
    generation_config.json asks for and this does not do; PackError if its files cannot be
    used, PreconditionError if the model's scores are not finite.
    """
    settings = settings or GenerationSettings()
    input_ids = encode_prompt(worker, prompt, chat=chat).to(worker.model.device)
    streamer = TokenStreamer(worker.tokenizer, on_text)
    decoding = Decoding(streamer)
    arguments = _generate_arguments(worker, settings, input_ids.shape[1])
    interrupted = False
    session = worker.session
    hits, misses, copied = session.host_hits, session.nvme_misses, session.remote_misses
    pack_reads = session.pack_reads
    moved, hinted = worker.device_stats, worker.hint_stats
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    memory = PeakPss() if measure_memory else None
    with memory or nullcontext():
        begin = time.perf_counter()
        try:
            worker.model.generate(
                input_ids,
                attention_mask=torch.ones_like(input_ids),
                streamer=streamer,
                custom_generate=decoding,
                **arguments,
            )
        except KeyboardInterrupt:
            interrupted = True
            streamer.end()
        except (
            ValueError,
            TypeError,
            LookupError,
            AttributeError,
            ImportError,
            RuntimeError,
        ) as error:
            if decoding.begun:
                raise
            raise PackError(
                f"transformers {transformers.__version__} cannot do what {GENERATION_CONFIG} of "
                f"{worker.pack} asks for: {reason_of(error)}."
            ) from error
    result = GenerationResult(
        text=worker.tokenizer.decode(streamer.tokens, skip_special_tokens=True),
        tokens=streamer.tokens,
        prompt_tokens=input_ids.shape[1],
        new_tokens=len(streamer.tokens),
        ttft_seconds=streamer.times[0] - begin if streamer.times else None,
        tokens_per_second=streamer.tokens_per_second,
        host_hits=session.host_hits - hits,
        nvme_misses=session.nvme_misses - misses,
        pack_reads=session.pack_reads - pack_reads,
        remote_misses=session.remote_misses - copied,
        peak_pss_bytes=None if memory is None else memory.peak_bytes,
        device=_since(moved, worker.device_stats),
        kernels=worker.kernels.name,
        decoding=decoding.way,
        hints=_since(hinted, worker.hint_stats),
    )
    return Generation(result, interrupted)


def _since(before: StatsT | None, now: StatsT | None) -> StatsT | None:
    return None if before is None or now is None else now.since(before)


def encode_prompt(worker: Worker, prompt: str, *, chat: bool) -> Tensor:  # [1, T], int64
    """The prompt's tokens. Raises InvalidInputError and PackError as :func:`generate` says."""
    return encode(worker.model, worker.tokenizer, prompt, chat=chat)


def _generate_arguments(
    worker: Worker, settings: GenerationSettings, prompt_tokens: int
) -> dict[str, Any]:
    # Past its context a model babbles; it does not stop by itself.
    room = context_tokens(worker.model.config)
    new_tokens = settings.max_new_tokens
    if room is not None:
        new_tokens = min(new_tokens, room - prompt_tokens)
    return generation_arguments(worker.model, worker.tokenizer, settings, new_tokens)
