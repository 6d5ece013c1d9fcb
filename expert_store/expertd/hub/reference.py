"""How a user names a model that is published on a hub."""

import re
from dataclasses import dataclass
from pathlib import Path

from expertd.packing.gguf.names import SUFFIX, model_name
from expertstore.errors import ConfigError

HUGGING_FACE, MODELSCOPE = "hf", "ms"
_NAME = r"[\w-][\w.-]*/[\w-][\w.-]*"
_REVISION = r"[\w.-][\w./-]*"
_REFERENCE = re.compile(
    rf"(?:(?P<hub>[a-z0-9]+)://)?(?P<name>{_NAME}?)(?:/(?P<file>{_REVISION}\.gguf))?"
    rf"(?::(?P<variant>[\w.-]+))?(?:@(?P<revision>{_REVISION}))?"
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
    file: str = ""
    """The path of a file in GGUF in it, or of any part of one."""
    variant: str = ""
    """What the name of a file in GGUF ends with, such as ``Q4_K_M``."""

    def __str__(self) -> str:
        file = f"/{self.file}" if self.file else ""
        variant = f":{self.variant}" if self.variant else ""
        revision = f"@{self.revision}" if self.revision else ""
        return f"{self.hub}://{self.name}{file}{variant}{revision}"

    @property
    def model(self) -> str:
        """The name without its owner, with its variant; or that of the file."""
        if self.file:
            return model_name(Path(self.file))
        name = self.name.partition("/")[2]
        return f"{name}-{self.variant}" if self.variant else name


def parse_reference(text: str) -> HubReference | None:
    """``ORG/NAME``, ``hf://ORG/NAME@REVISION`` or ``ms://...``; None for what is no such name.

    Of files in GGUF, ``ORG/NAME:VARIANT`` or ``hf://ORG/NAME/FILE.gguf``.

    Raises :class:`ConfigError` for a scheme of neither hub, and for a broken name after one.
    """
    found = _REFERENCE.fullmatch(text)
    if found is not None and not found["hub"] and text.endswith(SUFFIX):
        return None  # a file that is not there
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
    return HubReference(
        hub, found["name"], found["revision"], found["file"] or "", found["variant"] or ""
    )
