"""Which family's format a model's answers have."""

from functools import lru_cache

from expertd_inference.server.chat.families import FAMILIES, PLAIN, Family, family_named
from expertd_inference.server.chat.forced_calls import FORCED
from expertd_inference.server.chat.own_format import NAME as OWN
from expertd_inference.server.chat.own_format import family_described
from expertd_inference.server.hosting.model_text import ModelText


@lru_cache(maxsize=256)
def family_of(text: ModelText) -> Family:
    """The one that the model was started with, else as its tokenizer describes it.

    Of a tokenizer that describes nothing, it is found by the chat template, else by the
    vocabulary.
    """
    if text.chat_format is not None:
        return family_named(text.chat_format)
    if text.response_template is not None:
        described = family_described(text.response_template)
        if described is not None:
            return described
    return _by_signs(text)


def family_that_calls(text: ModelText) -> Family | None:
    """The one in which a grammar can describe calls; None if there is none.

    Of a format that the tokenizer describes itself, it is the one that the signs tell.
    """
    family = family_of(text)
    if family.name == OWN:
        family = _by_signs(text)
    return family if family.name in FORCED else None


def _by_signs(text: ModelText) -> Family:
    for place in (text.templates, " ".join(text.added_tokens)):
        for family in FAMILIES:
            if any(all(sign in place for sign in signs) for signs in family.signs):
                return family
    return PLAIN
