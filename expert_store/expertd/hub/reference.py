"""How a user names a model that is published on a hub."""

import re
from dataclasses import dataclass

from expertstore.errors import ConfigError

HUGGING_FACE, MODELSCOPE = "hf", "ms"
_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"
_REVISION = r"[\w.-][\w./-]*"
_REFERENCE = re.compile(
    rf"(?:(?P<hub>[a-z0-9]+)://)?(?P<name>{_NAME})(?:@(?P<revision>{_REVISION}))?"
)


@dataclass(frozen=True)
class HubReference:
    """A repository of a hub, and which state of it."""

    hub: str
    """``hf`` (Hugging Face) or ``ms`` (ModelScope)."""
    name: str
    """Owner and model, as in ``mistralai/Mixtral-8x7B-v0.1``."""
    revision: str | None = None
    """A branch, tag or commit; None is the main branch."""

    def __str__(self) -> str:
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.hub}://{self.name}{revision}"

    @property
    def model(self) -> str:
        """The name without its owner."""
        return self.name.partition("/")[2]


def parse_reference(text: str) -> HubReference | None:
    """``ORG/NAME``, ``hf://ORG/NAME@REVISION`` or ``ms://...``; None for what is no such name.

    Raises :class:`ConfigError` for a scheme of neither hub, and for a broken name after one.
    """
    found = _REFERENCE.fullmatch(text)
    if found is None:
        if "://" in text:
            raise ConfigError(
                f"{text!r} names no model; give hf://ORG/NAME or ms://ORG/NAME, with @REVISION "
                "for another than the main branch."
            )
        return None
    hub = found["hub"] or HUGGING_FACE
    if hub not in {HUGGING_FACE, MODELSCOPE}:
        raise ConfigError(
            f"{text!r} is on no hub that is known; give hf://ORG/NAME for Hugging Face, or "
            "ms://ORG/NAME for ModelScope."
        )
    return HubReference(hub, found["name"], found["revision"])
