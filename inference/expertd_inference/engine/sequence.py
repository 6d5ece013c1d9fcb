"""One continuation of a prompt: its tokens, its place in the KV pool, and how far it has come."""

import secrets
from collections import abc
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

from expertd_inference.settings import GenerationSettings

if TYPE_CHECKING:  # the front knows sequences' origins, and no torch
    from expertd_inference.experts.adapting import Adapter
    from expertd_inference.model.seen import Seen

_SEEDS = 1 << 64
_NEXT_CONTINUATION = 0x9E3779B97F4A7C15  # the golden ratio's 64 bits, as splitmix64 adds


class SequencePhase(Enum):
    """Where a sequence is in its life."""

    WAITING = "waiting"
    """For its turn: new, or preempted."""
    RUNNING = "running"
    """It has blocks, and each step may compute rows of it."""
    FINISHED = "finished"
    """Complete or cancelled: its blocks are given back."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """Whose sequence it is, and what of it exists already.

    ``user`` shares fairly with other users; of those who wait a higher ``priority`` goes first. A
    prefix is shared only among equal ``salt``. ``continuation`` numbers those of one prompt and
    seed. ``generated`` are tokens that another engine has chosen: this one goes on after them, as
    if they were its own.
    """

    user: str = ""
    priority: int = 0
    salt: str = ""
    continuation: int = 0
    generated: tuple[int, ...] = ()


ORIGIN = Origin()
"""Nobody in particular, from the beginning."""


def prefix_salt(origin: Origin, settings: GenerationSettings) -> str:
    """Sequences share prefixes if this is the same, since so are their keys and values."""
    salt, fewer = origin.salt, settings.fewer_experts
    if fewer is not None:
        salt += fewer.salt
    return salt if settings.adapter is None else f"{salt}\0adapter {settings.adapter}"


class Sequence:
    """What the scheduler knows of a sequence; the scheduler alone changes it.

    ``tokens`` are the prompt's and those generated; the keys and values of the first
    ``num_computed`` of them are in ``blocks``, the first ``num_from_prefix`` of which were found
    there. :class:`Origin` says the rest.
    """

    def __init__(
        self,
        id: int,  # noqa: A002 - its name everywhere
        prompt: abc.Sequence[int],
        settings: GenerationSettings,
        origin: Origin = ORIGIN,
        seen: "Seen | None" = None,
        adapter: "Adapter | None" = None,
    ) -> None:
        self.id = id
        self.tokens = [*prompt, *origin.generated]
        self.num_prompt = len(prompt)
        self.seen = seen
        """The images of its prompt; None without any."""
        self.keys = self.tokens if seen is None else [*seen.keys, *origin.generated]
        """What it is compared by with others: tokens, but where images are."""
        self.settings = settings
        self.user = origin.user
        self.priority = origin.priority
        self.adapter = adapter
        """What ``settings.adapter`` names, as it was when the sequence came."""
        self.salt = prefix_salt(origin, settings) + (adapter.key if adapter else "")
        self.is_long = False
        """Whether it has more tokens than the model's turning point, and keys of its own."""
        seed = secrets.randbits(64) if settings.seed is None else settings.seed
        self.seed = (seed + origin.continuation * _NEXT_CONTINUATION) % _SEEDS
        """Of all that is drawn for it; the first continuation's is that of the settings."""
        self.max_new_tokens = settings.max_new_tokens
        """No more than the context and the pool take, once the scheduler has accepted it."""
        self.phase = SequencePhase.WAITING
        self.num_computed = 0
        self.num_from_prefix = 0
        self.blocks: list[int] = []
        self.state: int | None = None
        self.names: list[bytes] = []
        """Of its full blocks, as far as they were asked for (:mod:`.prefix`)."""
        self.rank = (0, 0)
        """Its place among those who wait or run: the smallest is never preempted."""

    def become_long(self) -> None:
        """It shares no prefix with shorter ones from now on."""
        self.is_long = True
        self.salt += "\0long"
        self.names = []

    def append(self, token: int) -> None:
        """The next one was chosen."""
        self.tokens.append(token)
        if self.keys is not self.tokens:
            self.keys.append(token)

    @property
    def num_new(self) -> int:
        """Tokens generated so far."""
        return len(self.tokens) - self.num_prompt

    @property
    def num_missing(self) -> int:
        """Rows to compute before the next token can be chosen."""
        return len(self.tokens) - self.num_computed

    @property
    def is_decoding(self) -> bool:
        """Whether only the token that was chosen last is to be computed."""
        return self.num_new > 0 and self.num_missing == 1

    @property
    def may_use_prefix(self) -> bool:
        """Not if logits of the prompt's tokens are asked for: those are not kept."""
        return self.settings.prompt_logprobs is None

    def __repr__(self) -> str:
        return (
            f"<Sequence {self.id} {self.phase.value}: {self.num_prompt} + {self.num_new} tokens, "
            f"{self.num_computed} computed, {len(self.blocks)} blocks>"
        )
