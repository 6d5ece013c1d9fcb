"""What clients of llama-server send to ``/completion``, in OpenAI's fields."""

from typing import Any, ClassVar

import msgspec

from expertd_inference.server.api.errors import ApiError, unsupported, wrong_value
from expertd_inference.server.api.sampling_fields import is_token
from expertd_inference.server.hosting.model_text import ModelText
from expertd_inference.settings import MAX_BIAS

_NEUTRAL: dict[str, tuple[object, ...]] = {
    "typical_p": (1.0,),
    "top_n_sigma": (-1.0, 0.0),
    "xtc_probability": (0.0,),
    "dry_multiplier": (0.0,),
    "dynatemp_range": (0.0,),
    "mirostat": (0,),
    "n_indent": (0,),
    "t_max_predict_ms": (-1, 0),
    "post_sampling_probs": (False,),
    "return_progress": (False,),
    "lora": ([],),
}
"""Fields that would change the answer, and the values with which they change nothing."""
_ANY_SEED = (None, -1, 0xFFFFFFFF)
Prompt = str | list[Any] | dict[str, Any]


class LlamaFields(msgspec.Struct, kw_only=True):
    """How to continue a prompt, which is in the field ``prompt_name``."""

    prompt_name: ClassVar = "prompt"
    model: str | None = None
    stream: bool = False
    n_predict: int | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: list[tuple[int | str, float | bool]] | dict[str, float | bool] | None = None
    stop: list[str] | str | None = None
    experts_per_token: int | None = None
    expert_threshold: float | None = None
    ignore_eos: bool = False
    n_probs: int = 0
    grammar: str | None = None
    json_schema: dict[str, Any] | None = None
    return_tokens: bool = False
    timings_per_token: bool = False
    response_fields: list[str] | None = None
    typical_p: Any = None
    top_n_sigma: Any = None
    xtc_probability: Any = None
    dry_multiplier: Any = None
    dynatemp_range: Any = None
    mirostat: Any = None
    n_indent: Any = None
    t_max_predict_ms: Any = None
    post_sampling_probs: Any = None
    return_progress: Any = None
    lora: Any = None
    # These change nothing here, and are no surprise.
    cache_prompt: bool | None = None
    id_slot: int | None = None
    n_keep: int | None = None
    samplers: Any = None

    @property
    def names(self) -> dict[str, str]:
        """What fields of OpenAI's are called here."""
        return {
            "messages": self.prompt_name,
            "max_tokens": "max_tokens" if self.n_predict is None else "n_predict",
            "repetition_penalty": "repeat_penalty",
            "logprobs": "n_probs",
        }


class LlamaRequest(LlamaFields, kw_only=True):
    """The body of ``/completion``."""

    prompt: Prompt


class ExtraFile(msgspec.Struct, kw_only=True):
    """Another file of the repository."""

    text: str
    filename: str = "tmp"


class InfillRequest(LlamaFields, kw_only=True):
    """The body of ``/infill``; ``prompt`` is what fills the gap so far."""

    prompt_name: ClassVar = "input_prefix"
    input_prefix: str
    input_suffix: str
    input_extra: list[ExtraFile] = msgspec.field(default_factory=list)
    prompt: str = ""


def fields_of(body: LlamaFields, text: ModelText) -> dict[str, Any]:
    """The request in OpenAI's fields, but for the prompt. Raises ApiError for what is not done."""
    for name, neutral in _NEUTRAL.items():
        value = getattr(body, name)
        if value is not None and value not in neutral:
            raise unsupported(name, f"is not supported; leave it out, or give {neutral[0]}.")
    if body.repeat_penalty not in (None, 1.0) and body.repeat_last_n not in (None, -1):
        raise unsupported("repeat_last_n", "may only be -1: repetitions count in the whole text.")
    limit = body.max_tokens if body.n_predict is None else body.n_predict
    return {
        "model": body.model,
        "messages": [],
        "max_completion_tokens": None if limit is None or limit < 0 else limit,
        "temperature": body.temperature,
        "top_k": body.top_k,
        "top_p": body.top_p,
        "min_p": body.min_p,
        "seed": None if body.seed in _ANY_SEED else body.seed,
        "repetition_penalty": body.repeat_penalty,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "experts_per_token": body.experts_per_token,
        "expert_threshold": body.expert_threshold,
        "logit_bias": {str(token): bias for token, bias in _biases(body, text).items()},
        "stop": body.stop,
        "ignore_eos": body.ignore_eos,
        "logprobs": body.n_probs > 0,
        "top_logprobs": body.n_probs or None,
        "grammar": body.grammar,
        "json_schema": body.json_schema,
    }


def prompts_of(prompt: Prompt, text: ModelText) -> list[list[int]]:
    """Tokens of each prompt: a list with a number is one, of tokens and texts; else several.

    Raises ApiError.
    """
    is_several = isinstance(prompt, list) and not any(isinstance(one, int) for one in prompt)
    prompts = [_tokens(one, text) for one in (prompt if is_several else [prompt])]
    if not prompts:
        raise wrong_value("prompt", [], "at least one text or token")
    return prompts


def _tokens(prompt: Any, text: ModelText) -> list[int]:  # noqa: ANN401 - of any JSON
    match prompt:
        case str():
            return text.encode(prompt)
        case {"prompt_string": str(), "multimodal_data": data} if data:
            raise unsupported("multimodal_data", "is not supported: this server takes text.")
        case {"prompt_string": str(given)}:
            return text.encode(given)
        case [*parts] if parts and all(type(part) in (int, str) for part in parts):
            tokens: list[int] = []
            for at, part in enumerate(parts):
                tokens += text.encode(part, special=at == 0) if isinstance(part, str) else [part]
            return tokens
    raise wrong_value("prompt", prompt, "a text, or a list of texts, tokens or prompts")


def _biases(body: LlamaFields, text: ModelText) -> dict[int, float]:
    """By token. llama-server takes a text for all of its tokens, and false for "never"."""
    given = body.logit_bias or {}
    biases: dict[int, float] = {}
    for key, value in given.items() if isinstance(given, dict) else given:
        if value is True:
            raise ApiError(
                400, "logit_bias has true; give a number, or false for never.", param="logit_bias"
            )
        bias = -float(MAX_BIAS) if value is False else value
        is_number = isinstance(key, int) or is_token(key)
        if not is_number and str(key).isdecimal() and str(key).isascii():
            raise ApiError(
                400,
                f"logit_bias has the key {key!r:.80}, which is no token; give one of fewer digits.",
                param="logit_bias",
            )
        tokens = [int(key)] if is_number else text.encode(str(key), special=False)
        biases |= dict.fromkeys(tokens, bias)
    return biases
