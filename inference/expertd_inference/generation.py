"""Generates text from a prompt, streams it, and counts what it took."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

import msgspec
import torch
from torch import Tensor

from expertd.errors import InvalidInputError
from expertd_inference.decoding import Decoding
from expertd_inference.device.stats import DeviceStats
from expertd_inference.hints import HintStats
from expertd_inference.memory import PeakPss
from expertd_inference.settings import GenerationSettings
from expertd_inference.streaming import TokenStreamer
from expertd_inference.worker import Worker

StatsT = TypeVar("StatsT", DeviceStats, HintStats)


class GenerationResult(msgspec.Struct, frozen=True, kw_only=True):
    """What was generated and what it took.

    ``tokens`` are the new ids, with the end-of-text token if it came to that. ``ttft_seconds``
    runs from the prompt's tokens to the first new one (null if there was none);
    ``tokens_per_second`` counts from the first to the last (null below two). ``host_hits``
    and ``nvme_misses`` are the experts found in RAM and those that the daemon had to read,
    ``remote_misses`` those copied from a daemon whose memory this process cannot share;
    ``device`` is what moved to GPUs, null on the CPU; ``kernels`` are those that the CPU
    computed with; ``decoding`` is how its tokens after the second came: by a ``program``, or by
    the model's ``modules`` and why (empty with fewer tokens); ``hints`` is what became of hints
    to the daemon, null where none are given.
    """

    text: str
    tokens: list[int]
    prompt_tokens: int
    new_tokens: int
    ttft_seconds: float | None
    tokens_per_second: float | None
    host_hits: int
    nvme_misses: int
    remote_misses: int
    peak_pss_bytes: int
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
) -> Generation:
    """Continues ``prompt``, or with ``chat`` answers it in the model's chat template.

    ``on_text`` is given the text piece by piece as it comes. On SIGINT it returns what
    there is. Raises InvalidInputError for a prompt that has no tokens or fills the model's
    context, or with ``chat`` if the model has no template.
    """
    settings = settings or GenerationSettings()
    input_ids = encode_prompt(worker, prompt, chat=chat).to(worker.model.device)
    streamer = TokenStreamer(worker.tokenizer, on_text)
    decoding = Decoding(streamer)
    interrupted = False
    session = worker.session
    hits, misses, copied = session.host_hits, session.nvme_misses, session.remote_misses
    moved, hinted = worker.device_stats, worker.hint_stats
    if settings.seed is not None:
        torch.manual_seed(settings.seed)
    arguments = _generate_arguments(worker, settings, input_ids.shape[1])
    num_tokens = input_ids.shape[1] + arguments["max_new_tokens"]
    with PeakPss() as memory, worker.lend_cache(num_tokens) as cache:
        if cache is not None:
            # transformers would compile the model for a cache of this kind.
            arguments |= {"past_key_values": cache, "disable_compile": True}
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
    result = GenerationResult(
        text=worker.tokenizer.decode(streamer.tokens, skip_special_tokens=True),
        tokens=streamer.tokens,
        prompt_tokens=input_ids.shape[1],
        new_tokens=len(streamer.tokens),
        ttft_seconds=streamer.times[0] - begin if streamer.times else None,
        tokens_per_second=streamer.tokens_per_second,
        host_hits=session.host_hits - hits,
        nvme_misses=session.nvme_misses - misses,
        remote_misses=session.remote_misses - copied,
        peak_pss_bytes=memory.peak_bytes,
        device=_since(moved, worker.device_stats),
        kernels=worker.kernels.name,
        decoding=decoding.way,
        hints=_since(hinted, worker.hint_stats),
    )
    return Generation(result, interrupted)


def _since(before: StatsT | None, now: StatsT | None) -> StatsT | None:
    return None if before is None or now is None else now.since(before)


def encode_prompt(worker: Worker, prompt: str, *, chat: bool) -> Tensor:  # [1, T], int64
    """The prompt's tokens. Raises InvalidInputError as :func:`generate` says."""
    tokenizer = worker.tokenizer
    if chat:
        if not tokenizer.chat_template:
            raise InvalidInputError(
                f"The model {worker.session.model.name} has no chat template; leave out --chat."
            )
        ids: list[int] = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], add_generation_prompt=True, return_dict=False
        )
    else:
        ids = tokenizer(prompt).input_ids
    if not ids:
        raise InvalidInputError("The prompt is empty; this model needs at least one token.")
    context = _context_tokens(worker.model)
    if context is not None and len(ids) >= context:
        raise InvalidInputError(
            f"The prompt has {len(ids)} tokens, which leaves no room in the model's context "
            f"of {context}; shorten it."
        )
    return torch.tensor([ids])


def _generate_arguments(
    worker: Worker, settings: GenerationSettings, prompt_tokens: int
) -> dict[str, Any]:
    model = worker.model
    room = _context_tokens(model)
    new_tokens = settings.max_new_tokens
    arguments: dict[str, Any] = {
        # Past its context a model babbles; it does not stop by itself.
        "max_new_tokens": new_tokens if room is None else min(new_tokens, room - prompt_tokens),
        "do_sample": settings.temperature > 0,
    }
    config = model.generation_config
    if config.pad_token_id is None and config.eos_token_id is not None:
        # One sequence is never padded; without this transformers chooses the same and says so.
        eos = config.eos_token_id
        arguments["pad_token_id"] = eos[0] if isinstance(eos, list) else eos
    if settings.temperature > 0:
        # top_k off: transformers' default of 50 is nobody's wish here.
        arguments |= {"temperature": settings.temperature, "top_p": settings.top_p, "top_k": 0}
    else:
        arguments |= {"temperature": None, "top_p": None, "top_k": None, "num_beams": 1}
    return arguments


def _context_tokens(model: Any) -> int | None:  # noqa: ANN401 - transformers is untyped
    limit: int | None = getattr(model.config, "max_position_embeddings", None)
    return limit
