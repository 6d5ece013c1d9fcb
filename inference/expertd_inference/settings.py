"""How a generation is asked for; needs no torch."""

from dataclasses import dataclass
from enum import StrEnum

from expertstore.errors import InvalidInputError


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


@dataclass(frozen=True)
class GenerationSettings:
    """How to choose tokens. ``temperature`` 0 takes the likeliest each time.

    ``top_p`` None is the pack's own, or 1. Raises InvalidInputError if a value makes no sense.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidInputError(f"max_new_tokens is {self.max_new_tokens}; give at least 1.")
        if not 0 <= self.temperature <= 100:
            raise InvalidInputError(f"temperature is {self.temperature}; give 0 to 100.")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            raise InvalidInputError(f"top_p is {self.top_p}; give more than 0 and at most 1.")
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise InvalidInputError(f"seed is {self.seed}; give 0 to 2**64 - 1.")


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
