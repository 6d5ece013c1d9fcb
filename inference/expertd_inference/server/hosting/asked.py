"""A sequence as the front keeps it until it is complete."""

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from expertd_inference.engine.channel import Channel
from expertd_inference.engine.token import Token
from expertd_inference.server.hosting.messages import Begin
from expertd_inference.server.metrics import ABORTED, Times

if TYPE_CHECKING:
    from expertd_inference.server.hosting.engine_seat import EngineSeat

SUSPECT_DEATHS = 2
"""A sequence during which so many engines end, without a token between, is next computed alone."""


@dataclass(eq=False)
class Asked:
    """All that any engine needs to go on with a sequence; ``seat`` is whose it is now."""

    begin: Begin
    channel: Channel[Token]
    times: Times
    seat: "EngineSeat"
    generated: list[int] = field(default_factory=list)
    num_deaths: int = 0
    reason: str = ABORTED

    @property
    def is_suspect(self) -> bool:
        """Whether engines may have ended because of it."""
        return self.num_deaths >= SUSPECT_DEATHS

    @property
    def tokens(self) -> list[int]:
        """Of the prompt, and those generated."""
        return [*self.begin.tokens, *self.generated]

    def again(self) -> Begin:
        """From the beginning, or after the tokens that were delivered."""
        origin, settings = self.begin.origin, self.begin.settings
        if self.generated:
            origin = replace(origin, generated=tuple(self.generated))
            # The client has them; and without them the prompt may be found as a prefix.
            settings = replace(settings, prompt_logprobs=None)
        return Begin(self.begin.id, self.begin.tokens, settings, origin, self.begin.images)
