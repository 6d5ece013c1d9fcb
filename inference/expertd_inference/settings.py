"""How a generation is asked for; needs no torch."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum

from expertd_inference.fewer_experts import FewerExperts, check_fewer
from expertd_inference.field_types import check_types
from expertd_inference.grammar import GrammarSpec
from expertstore.errors import InvalidInputError, SettingError


class ComputeDtype(StrEnum):
    """What to compute in, by torch's names."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


class KernelsName(StrEnum):
    """What computes on the CPU."""

    AUTO = "auto"
    """Native, but for packs of 16-bit experts, whose reference gives stock's very bits."""
    NATIVE = "native"
    REFERENCE = "reference"


class Activations(StrEnum):
    """Bits of activations that meet quantized weights, where a step has several rows."""

    BITS_16 = "16"
    BITS_8 = "8"


MAX_LOGPROBS = 20
"""How many of the likeliest tokens may be asked for with each token."""

MAX_BIAS = 10**9
"""Far more than any score, and finite in float32 whatever penalties come to it."""


@dataclass(frozen=True)
class GenerationSettings:
    """How to choose tokens, and when to stop.

    Which token: ``temperature`` 0 takes the likeliest each time. ``top_k``, ``top_p``, ``min_p``
    and ``repetition_penalty`` are as in transformers, None the pack's own or none; ``top_k`` 0 is
    none. ``presence_penalty`` is taken from the scores of tokens generated so far,
    ``frequency_penalty`` once for each time. ``logit_bias`` is added to the scores of these tokens;
    ``allowed_tokens`` are the only ones; ``bad_words`` are sequences of tokens that do not come.
    The text depends on ``seed``, 0 to 2**64 - 1, and on nothing else; None takes another each time.

    When to stop: after ``max_new_tokens``, or at the end of the text unless ``ignore_eos``, at one
    of ``stop_tokens``, or once the text has one of ``stop``, of which nothing is passed on unless
    ``include_stop``; not before ``min_new_tokens``.

    Which text: what a ``grammar`` allows and nothing else, whatever the model's scores. The text
    ends as soon as nothing may follow, and only where the grammar may end, ``ignore_eos`` and
    ``min_new_tokens`` or not; but ``max_new_tokens`` and ``stop`` may cut it before. Needs
    ``expertd[serve]``.

    What is given: the text without special tokens, if ``skip_special_tokens``; with each token its
    log-probability and the ``logprobs`` likeliest ones (0 to 20; None for nothing of this), by the
    model's own scores; ``prompt_logprobs`` is the same for the tokens of the prompt. Of a
    ``prompt_only`` nothing else is wanted: it may fill the whole context, and the one token that
    comes after it carries what is known of it.

    Which experts: of those that a router chooses for a token, the ``experts_per_token`` of
    greatest weight, and none whose share of the weights of all that it chose is below
    ``expert_threshold``, 0 to 1, but one in any case. Those kept have the weights that the router
    gave them. None is what the engine has been told, or all. ``adapter`` is the directory of
    an adapter in peft's format, whose layers are added to the model's.

    Raises SettingError, and InvalidInputError for a value of another type, if that makes no sense.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_tokens: tuple[int, ...] | None = None
    bad_words: tuple[tuple[int, ...], ...] = ()
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    min_new_tokens: int = 0
    ignore_eos: bool = False
    include_stop: bool = False
    skip_special_tokens: bool = True
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    prompt_only: bool = False
    grammar: GrammarSpec | None = None
    experts_per_token: int | None = None
    expert_threshold: float | None = None
    adapter: str | None = None

    def __post_init__(self) -> None:
        if isinstance(self.stop, str):
            raise _wrong("stop", f"is a text, {self.stop!r}; give a tuple of texts.")
        check_types(self)
        if self.max_new_tokens < 1:
            raise _wrong("max_new_tokens", f"is {self.max_new_tokens}; give at least 1.")
        if not 0 <= self.min_new_tokens <= self.max_new_tokens:
            raise _wrong(
                "min_new_tokens",
                f"is {self.min_new_tokens}; give 0 to {self.max_new_tokens}, the most tokens that "
                "may come.",
            )
        if not 0 <= self.temperature <= 100:
            raise _wrong("temperature", f"is {self.temperature}; give 0 to 100.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise _wrong("top_p", f"is {self.top_p}; give more than 0 and at most 1.")
        if self.top_k is not None and self.top_k < 0:
            raise _wrong("top_k", f"is {self.top_k}; give at least 1, or 0 for none.")
        if self.min_p is not None and not 0 <= self.min_p <= 1:
            raise _wrong("min_p", f"is {self.min_p}; give 0 to 1.")
        if self.repetition_penalty is not None and not 0 < self.repetition_penalty <= 100:
            raise _wrong(
                "repetition_penalty",
                f"is {self.repetition_penalty}; give more than 0 and at most 100; 1 is none.",
            )
        for name in ("presence_penalty", "frequency_penalty"):
            if not abs(value := getattr(self, name)) <= 100:
                raise _wrong(name, f"is {value}; give -100 to 100; 0 is none.")
        for token, bias in self.logit_bias.items():
            if not abs(bias) <= MAX_BIAS:
                raise _wrong(
                    "logit_bias", f"of token {token} is {bias}; give {-MAX_BIAS} to {MAX_BIAS}."
                )
        if self.allowed_tokens is not None and not self.allowed_tokens:
            raise _wrong("allowed_tokens", "has no token; give at least one, or leave it out.")
        if not all(self.bad_words):
            raise _wrong("bad_words", "has an empty word; leave that word out.")
        if not all(self.stop):
            raise _wrong("stop", "has an empty text, which is everywhere; leave that text out.")
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise _wrong("seed", f"is {self.seed}; give 0 to 2**64 - 1.")
        for name in ("logprobs", "prompt_logprobs"):
            if (value := getattr(self, name)) is not None and not 0 <= value <= MAX_LOGPROBS:
                raise _wrong(name, f"is {value}; give 0 to {MAX_LOGPROBS}, or leave it out.")
        check_fewer(self.experts_per_token, self.expert_threshold)

    @property
    def fewer_experts(self) -> FewerExperts | None:
        """Which experts compute a token; None for all that routers choose."""
        return FewerExperts.of(self.experts_per_token, self.expert_threshold)

    def named_tokens(self) -> Iterator[tuple[str, int]]:
        """Each token that a field names, with the field's name."""
        yield from (("logit_bias", token) for token in self.logit_bias)
        yield from (("allowed_tokens", token) for token in self.allowed_tokens or ())
        yield from (("stop_tokens", token) for token in self.stop_tokens)
        yield from (("bad_words", token) for word in self.bad_words for token in word)


def _wrong(setting: str, problem: str) -> SettingError:
    return SettingError(f"{setting} {problem}", setting=setting)


def check_prompt(prompt: str) -> None:
    """Raises InvalidInputError for text with bytes that are not UTF-8, as Python reads them."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise InvalidInputError(
            f"The prompt is not UTF-8 text: {error.reason} (character {error.start})."
        ) from error


class CachePolicy(StrEnum):
    """Which expert a device's cache gives up."""

    LRU = "lru"
    """The least recently used of its layer; each layer has its share of the slots."""
    AGED = "aged"
    """The least used of all layers, where a use counts half after each half-life."""


class OnMiss(StrEnum):
    """What is done about an expert that is not in the device's cache."""

    COPY = "copy"
    CPU = "cpu"
    """Computed from the host's memory, where it stays."""
    AUTO = "auto"
    """Whatever is measured to be faster, for each layer."""


class DecodeGraphsMode(StrEnum):
    """Whether steps of one token are recorded on a GPU, and replayed."""

    AUTO = "auto"
    """Whole on one GPU that reads the arena itself, has room for one token's experts and a fast
    link; else segments; off on several. By estimates: nothing was measured on a GPU."""
    OFF = "off"
    SEGMENTS = "segments"
    """The trunk is recorded, and the host brings the experts."""
    WHOLE = "whole"
    """All is recorded, and the GPU finds and copies experts by itself."""


MAX_SPECULATE_LAYERS = 3
MIN_STAGING_SLOTS = 4
GUESSED_EXPERTS = 2
"""Of a layer, unless told otherwise: of more, most would come too late to be of use."""


@dataclass(frozen=True)
class DeviceSettings:
    """Where experts are computed, and how they come there.

    ``device``: ``cpu``, or such as ``cuda`` or ``cuda:1``; several, with commas between them, share
    the layers. ``cache_bytes`` bounds the experts on each device; None takes what is free once
    the trunk is there, but for a reserve. ``staging_slots`` of them are for guesses, None for as
    many as guesses need. ``speculate_layers`` is how many layers ahead is guessed, 0 for not at
    all, by default 1 on a GPU, and on the CPU what is measured to be fastest; ``speculate_experts``
    how many experts of each: by default 2 on a GPU, which has room for
    few, and on the CPU, where a guess is a hint to the daemon, as many as a token uses.
    ``decode_graphs`` is for one GPU. Raises InvalidInputError if a value makes no sense.
    """

    device: str = "cpu"
    cache_bytes: int | None = None
    cache_policy: CachePolicy = CachePolicy.LRU
    speculate_layers: int | None = None
    speculate_experts: int | None = None
    staging_slots: int | None = None
    on_miss: OnMiss = OnMiss.AUTO
    decode_graphs: DecodeGraphsMode = DecodeGraphsMode.AUTO

    def __post_init__(self) -> None:
        if self.cache_bytes is not None and self.cache_bytes < 1:
            raise InvalidInputError(f"cache_bytes is {self.cache_bytes}; give at least 1.")
        if not 0 <= self.layers_guessed <= MAX_SPECULATE_LAYERS:
            raise InvalidInputError(
                f"speculate_layers is {self.speculate_layers}; give 0 to {MAX_SPECULATE_LAYERS}."
            )
        if self.speculate_experts is not None and self.speculate_experts < 1:
            raise InvalidInputError(
                f"speculate_experts is {self.speculate_experts}; give at least 1, or "
                "speculate_layers 0 for none."
            )
        if self.staging_slots is not None and self.staging_slots < self.num_guesses:
            raise InvalidInputError(
                f"staging_slots is {self.staging_slots}, and {self.num_guessed} experts of "
                f"each of {self.layers_guessed} layers are guessed, which need "
                f"{self.num_guesses}; give as many, or guess less."
            )

    def for_exact(self) -> "DeviceSettings":
        """These, but no expert is computed on the CPU, and no step is recorded.

        Both round otherwise, and depend on what is cached and what else is computed. Raises
        InvalidInputError if one of them was asked for.
        """
        graphs = self.decode_graphs
        if self.on_miss is OnMiss.CPU:
            raise InvalidInputError(
                "With --on-miss cpu an expert's bits depend on whether it is in the GPU's cache, "
                "which --exact rules out; leave out one of them, or give --on-miss copy."
            )
        if graphs in (DecodeGraphsMode.SEGMENTS, DecodeGraphsMode.WHOLE):
            raise InvalidInputError(
                f"Recorded steps round otherwise than prompts (--decode-graphs {graphs}), which "
                "--exact rules out; leave out one of them."
            )
        return replace(self, on_miss=OnMiss.COPY, decode_graphs=DecodeGraphsMode.OFF)

    @property
    def layers_guessed(self) -> int:
        """How many layers ahead is guessed on a GPU."""
        return 1 if self.speculate_layers is None else self.speculate_layers

    @property
    def hint_choices(self) -> tuple[int, ...]:
        """How many layers ahead may be hinted to the daemon on the CPU; one is to be obeyed."""
        return (0, 1, 2) if self.speculate_layers is None else (self.speculate_layers,)

    @property
    def num_guessed(self) -> int:
        """How many experts of a layer are guessed on a GPU."""
        return GUESSED_EXPERTS if self.speculate_experts is None else self.speculate_experts

    @property
    def num_guesses(self) -> int:
        """How many guessed experts may wait to be used at once."""
        return self.layers_guessed * self.num_guessed

    @property
    def num_staging(self) -> int:
        """The staging slots of each device."""
        if self.staging_slots is not None:
            return self.staging_slots
        return max(MIN_STAGING_SLOTS, self.num_guesses) if self.layers_guessed else 0
