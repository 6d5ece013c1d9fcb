"""How a generation is asked for; needs no torch."""

from dataclasses import dataclass
from enum import StrEnum

from expertd.errors import InvalidInputError


class ComputeDtype(StrEnum):
    """What to compute in, by torch's names."""

    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"
    FLOAT32 = "float32"


@dataclass(frozen=True)
class GenerationSettings:
    """How to choose tokens. ``temperature`` 0 takes the likeliest each time.

    Raises InvalidInputError if a value makes no sense.
    """

    max_new_tokens: int = 128
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens < 1:
            raise InvalidInputError(f"max_new_tokens is {self.max_new_tokens}; give at least 1.")
        if not 0 <= self.temperature <= 100:
            raise InvalidInputError(f"temperature is {self.temperature}; give 0 to 100.")
        if not 0 < self.top_p <= 1:
            raise InvalidInputError(f"top_p is {self.top_p}; give more than 0 and at most 1.")
        if self.seed is not None and not 0 <= self.seed < 1 << 64:
            raise InvalidInputError(f"seed is {self.seed}; give 0 to 2**64 - 1.")
