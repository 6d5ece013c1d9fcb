"""What a scheduler may put in a batch, and how much may wait."""

from dataclasses import dataclass

from expertd_inference.kv.pool import BLOCK_TOKENS
from expertstore.errors import InvalidInputError


@dataclass(frozen=True, kw_only=True)
class SchedulerLimits:
    """What bounds a batch, the sequences that run, and the queue.

    ``max_running`` sequences have blocks at once; a batch has at most ``max_rows`` rows of at most
    ``max_spans`` sequences (1 for an executor that serves them in turns), of which at most
    ``max_prompts`` are chunks of prompts; unless ``mixed``, it has chunks of prompts or decoding
    rows, not both. With ``whole_prompts`` a prompt is one chunk, however long. With
    ``replays_rows`` generated tokens that a preemption has dropped are computed again a row a step,
    as they were the first time: recurrent layers compute other bits for a chunk.

    A text of more than ``turning_point`` tokens has other keys from its first token on: when it
    becomes so long it is computed anew, its first chunk ending behind that point.

    ``pause_ms`` is how long decoding sequences may wait for a chunk of a prompt; a chunk has a
    block of tokens at least. ``context_tokens`` is the model's context, ``vocabulary`` the number
    of its embeddings, ``experts_per_token`` how many experts each of its routers chooses. More than
    ``max_waiting`` sequences, or ``max_waiting_per_user`` of one user, do not wait: they are
    refused. Raises InvalidInputError if a value makes no sense.
    """

    max_running: int = 64
    max_rows: int = 512
    max_spans: int | None = None
    max_prompts: int | None = None
    mixed: bool = True
    whole_prompts: bool = False
    replays_rows: bool = False
    pause_ms: float = 200.0
    context_tokens: int | None = None
    vocabulary: int | None = None
    experts_per_token: tuple[int, ...] = ()
    turning_point: int | None = None
    max_waiting: int = 1024
    max_waiting_per_user: int | None = None

    def __post_init__(self) -> None:
        for name in (
            *("max_running", "max_rows", "max_spans", "max_prompts", "context_tokens"),
            *("vocabulary", "turning_point", "max_waiting", "max_waiting_per_user"),
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise InvalidInputError(f"{name} is {value}; give at least 1.")
        if not self.pause_ms > 0:
            raise InvalidInputError(f"pause_ms is {self.pause_ms}; give more than 0.")
        if (self.whole_prompts or self.replays_rows) and self.mixed and self.max_spans != 1:
            raise InvalidInputError(
                "whole_prompts and replays_rows are for models whose prompts are computed in "
                "batches of their own; give mixed=False too."
            )
        if self.replays_rows and self.max_rows <= BLOCK_TOKENS:
            # Chunks end at multiples of a block, but for a last one that would have one row.
            raise InvalidInputError(
                f"max_rows is {self.max_rows}, and this model's prompts are computed in chunks of "
                f"{BLOCK_TOKENS} tokens and one; give at least {BLOCK_TOKENS + 1}."
            )
