"""How a client asks for tokens: OpenAI's fields and vLLM's, for completions and chats alike."""

import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from expertd_inference.engine.sequence import Origin
from expertd_inference.engine.token import Token
from expertd_inference.server.api.errors import ApiError, unsupported
from expertd_inference.server.api.grammar_fields import GrammarFields
from expertd_inference.server.hosting.model_text import ModelText
from expertd_inference.server.variants import Variant
from expertd_inference.settings import GenerationSettings

MAX_CHOICES = 128
MAX_STOPS = 16
_UNSERVED = {
    "timings_per_token": "stream_options.continuous_usage_stats counts tokens",
    "return_progress": "the first event comes with the first token",
    "logits_processors": "logit_bias and bad_words change scores",
    "return_tokens_as_token_ids": "return_token_ids gives them",
    "prompt_embeds": "prompts are texts or tokens",
    "web_search_options": "give a tool of your own",
}
"""Fields that would change the answer, and what there is instead."""
NO_LIMIT = 1 << 40
"""Of new tokens: the engine cuts it to what the context takes."""


class StreamOptions(msgspec.Struct, kw_only=True):
    """What a stream tells beside its text."""

    idle: ClassVar = frozenset({"include_obfuscation"})
    include_usage: bool = False
    continuous_usage_stats: bool = False
    include_obfuscation: bool = False


class SamplingFields(GrammarFields, kw_only=True):
    """Fields of a request that say how tokens are chosen, and when to stop."""

    idle: ClassVar = frozenset(
        {
            *("user", "metadata", "store", "service_tier", "request_id", "cache_prompt"),
            *("safety_identifier", "prompt_cache_key", "spaces_between_special_tokens"),
            *("guided_decoding_backend", "prompt_cache_retention"),
        }
    )
    model: str | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, float] | None = None
    allowed_token_ids: list[int] | None = None
    bad_words: list[str] | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    min_tokens: int | None = None
    max_tokens: int | None = None
    ignore_eos: bool = False
    experts_per_token: int | None = None
    expert_threshold: float | None = None
    skip_special_tokens: bool = True
    include_stop_str_in_output: bool = False
    n: int | None = None
    best_of: int | None = None
    use_beam_search: bool = False
    prompt_logprobs: int | None = None
    return_token_ids: bool | None = None
    truncate_prompt_tokens: int | None = None
    priority: int = 0
    cache_salt: str | None = None
    timings_per_token: Any = None
    return_progress: Any = None
    logits_processors: Any = None
    return_tokens_as_token_ids: Any = None
    prompt_embeds: Any = None
    web_search_options: Any = None
    # These are idle.
    user: str | None = None
    metadata: dict[str, object] | None = None
    store: bool | None = None
    service_tier: str | None = None
    request_id: str | None = None
    cache_prompt: bool | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    spaces_between_special_tokens: bool | None = None

    @property
    def num_choices(self) -> int:
        """How many continuations of each prompt. Raises ApiError."""
        num = 1 if self.n is None else self.n
        if not 1 <= num <= MAX_CHOICES:
            raise ApiError(400, f"n is {num}; give 1 to {MAX_CHOICES}.", param="n")
        if self.best_of is not None and self.best_of != num:
            raise unsupported("best_of", "is not supported where it is not n; rank them yourself.")
        if self.use_beam_search:
            raise unsupported("use_beam_search", "is not supported; sample instead.")
        return num

    @property
    def usage(self) -> StreamOptions:
        """What a stream tells beside its text."""
        return self.stream_options or StreamOptions()

    @property
    def stops(self) -> tuple[str, ...]:
        """Stop strings. Raises ApiError if there are too many."""
        stops = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        if len(stops) > MAX_STOPS:
            raise ApiError(
                400, f"stop has {len(stops)} texts; give at most {MAX_STOPS}.", param="stop"
            )
        return stops

    def fill(self, variant: Variant) -> None:
        """Gives what is not given the variant's values."""
        for name, value in variant.sampling.items():
            if getattr(self, name) is None:
                setattr(self, name, value)

    def settings(
        self, text: ModelText, max_new_tokens: int, logprobs: int | None
    ) -> GenerationSettings:
        """As the engine has them. Raises InvalidInputError and ApiError."""
        for name, instead in _UNSERVED.items():
            if getattr(self, name) not in (None, False):
                raise unsupported(name, f"is not supported: {instead}.")
        temperature = text.temperature if self.temperature is None else self.temperature
        return GenerationSettings(
            max_new_tokens=min(max_new_tokens, NO_LIMIT),
            temperature=temperature,
            top_p=self.top_p,
            seed=None if self.seed is None else self.seed % (1 << 64),
            top_k=None if self.top_k is None else max(0, self.top_k),
            min_p=self.min_p,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty or 0.0,
            frequency_penalty=self.frequency_penalty or 0.0,
            logit_bias=_biases(self.logit_bias or {}),
            allowed_tokens=None if self.allowed_token_ids is None else (*self.allowed_token_ids,),
            bad_words=tuple(
                tuple(text.encode(word, special=False)) for word in self.bad_words or ()
            ),
            stop=self.stops,
            stop_tokens=tuple(self.stop_token_ids or ()),
            min_new_tokens=self.min_tokens or 0,
            ignore_eos=self.ignore_eos,
            include_stop=self.include_stop_str_in_output,
            skip_special_tokens=self.skip_special_tokens,
            logprobs=logprobs,
            prompt_logprobs=self.prompt_logprobs,
            grammar=self.grammar_spec(),
            experts_per_token=self.experts_per_token,
            expert_threshold=self.expert_threshold,
        )

    def origin(self, user: str, continuation: int) -> Origin:
        """Whose it is, and which of several continuations."""
        return Origin(
            user=user,
            priority=-self.priority,  # vLLM's smaller number goes first
            salt=self.cache_salt or "",
            continuation=continuation,
        )

    def stop_of(self, token: Token) -> int | str | msgspec.UnsetType:
        """Which of ``stop`` or ``stop_token_ids`` ended the sequence here, if one did."""
        stop = token.stop
        asked = isinstance(stop, str) or stop in (self.stop_token_ids or ())
        return stop if asked and stop is not None else msgspec.UNSET

    def cut(self, tokens: list[int], images: Sequence[bytes] = ()) -> list[int]:
        """A prompt's last tokens, if so many are wanted."""
        most = self.truncate_prompt_tokens
        if most is None or most == -1:
            return tokens
        if images:
            raise unsupported("truncate_prompt_tokens", "is not supported beside images.")
        if most < 1:
            raise ApiError(
                400,
                f"truncate_prompt_tokens is {most}; give at least 1.",
                param="truncate_prompt_tokens",
            )
        return tokens[-most:]


def is_token(key: str) -> bool:
    """Whether a key of JSON is a token's number: Python would take more, as in ``" 1_0 "``."""
    return re.fullmatch(r"[0-9]{1,19}", key) is not None


def _biases(biases: Mapping[str, float]) -> dict[int, float]:
    for key in biases:
        if not is_token(key):
            raise ApiError(
                400,
                f"logit_bias has the key {key!r:.80}; give tokens, as whole numbers in digits.",
                param="logit_bias",
            )
    return {int(token): bias for token, bias in biases.items()}
