"""Models under names of their own, with other defaults: a file of them."""

import tomllib
from dataclasses import fields
from pathlib import Path
from typing import Any

import msgspec

from expertd_inference.server.chat.families import family_named
from expertd_inference.settings import GenerationSettings
from expertstore.errors import ConfigError, ExpertdError, InvalidInputError


class Variant(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """An entry of the file: what counts where a request does not say; None is the model's own.

    ``model`` is the one that computes; None is the only one there is. ``system`` is a chat's system
    prompt, ``chat_template`` a file beside this one, whose text it becomes.
    """

    model: str | None = None
    system: str | None = None
    chat_template: str | None = None
    chat_format: str | None = None
    chat_template_kwargs: dict[str, Any] = {}
    reasoning_effort: str | None = None
    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    seed: int | None = None
    experts_per_token: int | None = None
    expert_threshold: float | None = None
    stop: str | list[str] | None = None

    @property
    def sampling(self) -> dict[str, Any]:
        """The fields of requests, for chats and completions, that it has a value for."""
        known = {field.name for field in fields(GenerationSettings)} | {"max_tokens"}
        return {
            name: value
            for name, value in msgspec.structs.asdict(self).items()
            if name in known and value is not None
        }


NO_VARIANT = Variant()


class _File(msgspec.Struct, forbid_unknown_fields=True):
    variants: dict[str, Variant]


def read_variants(path: Path | None) -> dict[str, Variant]:
    """Those of a file, by name. Raises ConfigError for one that says something else."""
    if path is None:
        return {}
    try:
        found = msgspec.convert(tomllib.loads(path.read_text()), _File).variants
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise ConfigError(
            f"The variants in {path} cannot be used: {error}; docs/server.md shows such a file."
        ) from error
    return {name: _checked(path, name, variant) for name, variant in found.items()}


def _checked(path: Path, name: str, variant: Variant) -> Variant:
    try:
        if variant.model == name:
            raise InvalidInputError("it has the name of its model; give it another.")
        if variant.chat_format is not None:
            family_named(variant.chat_format)
        settings = {**variant.sampling}
        settings["max_new_tokens"] = settings.pop("max_tokens", 1)
        stop = settings.pop("stop", ())
        GenerationSettings(stop=(stop,) if isinstance(stop, str) else tuple(stop), **settings)
        if variant.chat_template is None:
            return variant
        template = (path.parent / variant.chat_template).read_text()
        return msgspec.structs.replace(variant, chat_template=template)
    except (OSError, UnicodeDecodeError, ExpertdError) as error:
        raise ConfigError(f"The variant {name!r} in {path} cannot be used: {error}") from error
