"""Which texts a model may write: JSON of a schema, a regular expression, a choice, a grammar.

Needs no torch. llguidance does the work (the extra ``serve``): it is imported once a grammar is
asked for.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from functools import cache
from types import ModuleType
from typing import Any

import msgspec

from expertd_inference.field_types import check_types
from expertd_inference.process.reasons import MAX_CHARACTERS, reason_of
from expertstore.errors import ExpertdError, InvalidInputError, PreconditionError

MAX_BYTES = 1 << 18
"""Of a grammar's text: a larger one takes seconds before the first token."""
CHECKED_BYTES = 1 << 14
"""Up to so many a grammar is checked where it is asked for; a larger one when it is used."""
JSON_OPTIONS = {"whitespace_pattern": r"\r?\n?[ \t]{0,40}"}
"""llguidance's. Without a bound between JSON's parts, some models write spaces for ever."""
_EXCERPT = re.compile(r"\s*(\d+ \||\^|<non-verbose)")


_NOTHING = "NoExtensionBias"
"""What llguidance says of a grammar that allows nothing."""


class GrammarKind(StrEnum):
    """What a grammar's text is."""

    JSON_OBJECT = "json_object"
    """Nothing: any JSON object."""
    JSON_SCHEMA = "json_schema"
    """A JSON schema."""
    REGEX = "regex"
    """A regular expression of Rust's regex crate, which the whole text matches."""
    CHOICE = "choice"
    """A JSON list of texts, one of which it is."""
    GBNF = "gbnf"
    """A grammar as llama.cpp has it."""
    LARK = "lark"
    """A grammar in llguidance's dialect of Lark."""


_NAMES = {
    GrammarKind.JSON_OBJECT: "JSON object",
    GrammarKind.JSON_SCHEMA: "JSON schema",
    GrammarKind.REGEX: "regular expression",
    GrammarKind.CHOICE: "choice",
    GrammarKind.GBNF: "GBNF grammar",
    GrammarKind.LARK: "Lark grammar",
}


@dataclass(frozen=True, slots=True)
class GrammarSpec:
    """The texts that a sequence may have: ``kind`` says what ``text`` is.

    :func:`grammar_of_json_schema` and the others below make it from what a program has. Unless it
    is empty, ``frame`` is a grammar in Lark of the whole text, in which ``@inner`` stands for this
    one. Errors call it ``name`` if that is not empty. Raises InvalidInputError for a kind that is
    none of them.
    """

    kind: GrammarKind
    text: str = ""
    frame: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        check_types(self)

    def check(self) -> None:
        """Raises InvalidInputError with llguidance's reason if the grammar is none.

        Special tokens are taken on trust: they depend on a tokenizer. A large grammar, which may
        take a second, is left to the engine, which checks it before it computes anything. Raises
        PreconditionError if llguidance is not installed.
        """
        library()
        if CHECKED_BYTES < len(self.text) + len(self.frame) <= MAX_BYTES:
            return
        is_wrong, reasons = library().LLMatcher.validate_grammar_with_warnings(
            source_of(self), limits=limits()
        )
        if is_wrong:
            raise wrong(self, reasons[0])
        # That did not look at what it allows. Special tokens are another tokenizer's.
        matcher = library().LLMatcher(
            _any_tokenizer(), source_of(self), log_level=0, limits=limits()
        )
        matcher.compute_logit_bias()
        if (reason := matcher.get_error()).startswith(_NOTHING):
            raise wrong(self, reason)


def grammar_of_json_schema(schema: Mapping[str, Any] | bool) -> GrammarSpec:
    """JSON that a schema allows."""
    return GrammarSpec(GrammarKind.JSON_SCHEMA, _json(schema))


def grammar_of_json_object() -> GrammarSpec:
    """Any JSON object."""
    return GrammarSpec(GrammarKind.JSON_OBJECT)


def grammar_of_regex(pattern: str) -> GrammarSpec:
    """A text that ``pattern`` matches from its beginning to its end."""
    return GrammarSpec(GrammarKind.REGEX, pattern)


def grammar_of_choice(choices: Sequence[str]) -> GrammarSpec:
    """One of these texts."""
    return GrammarSpec(GrammarKind.CHOICE, _json(list(choices)))


def grammar_of_text(text: str) -> GrammarSpec:
    """A grammar in GBNF or Lark, whichever it is. Raises PreconditionError as :func:`library`."""
    library()
    from llguidance.gbnf_to_lark import is_lark_syntax

    return GrammarSpec(GrammarKind.LARK if is_lark_syntax(text) else GrammarKind.GBNF, text)


def source_of(spec: GrammarSpec) -> str:
    """The grammar as llguidance reads it. Raises InvalidInputError for what is none."""
    num_bytes = len((spec.text + spec.frame).encode(errors="surrogatepass"))
    if num_bytes > MAX_BYTES:
        raise InvalidInputError(
            f"The {spec.name or _NAMES[spec.kind]} has {num_bytes} bytes; give at most {MAX_BYTES}."
        )
    try:
        spec.text.encode()
        made = _source(spec, library().LLMatcher)
        return _framed(made, spec.frame) if spec.frame else made
    except (ExpertdError, MemoryError):
        raise
    except Exception as error:  # the converter of GBNF has several kinds, plain Exception too
        raise wrong(spec, reason_of(error)) from error


def wrong(spec: GrammarSpec, reason: str) -> InvalidInputError:
    """The error, in one sentence, of a grammar that cannot be used for llguidance's ``reason``."""
    # Without excerpts of the grammar, and places in them.
    said = " ".join(line for line in reason.splitlines() if not _EXCERPT.match(line))
    said = " ".join(said.split())
    if said == _NOTHING:
        said = "no text fits it, as where a part of it is only itself"
    if len(said) > MAX_CHARACTERS:
        said = f"{said[:MAX_CHARACTERS]}..."
    name = spec.name or _NAMES[spec.kind]
    return InvalidInputError(
        f"The {name} cannot be used: {said.rstrip('.')}; mend it, or leave it out."
    )


def pattern_of(text: str) -> str:
    """A regular expression that matches this text alone."""
    return "".join(one if one.isalnum() else f"\\x{{{ord(one):x}}}" for one in text)


def limits() -> Any:  # noqa: ANN401 - LLParserLimits
    """What a grammar may take: the library's own limits, and reasons without its state."""
    return library().LLParserLimits(verbose_errors=False)


@cache
def _any_tokenizer() -> Any:  # noqa: ANN401 - LLTokenizer
    """One that makes every text, whose tokens are bytes."""
    return library().LLTokenizer("byte")


def library() -> ModuleType:
    """Imports llguidance. Raises PreconditionError if it is not installed."""
    try:
        import llguidance
    except ModuleNotFoundError as error:
        raise PreconditionError(
            "Structured output needs llguidance, which is not installed: "
            "pip install 'expertd[serve]'."
        ) from error
    return llguidance


def _source(spec: GrammarSpec, matcher: Any) -> str:  # noqa: ANN401 - the class LLMatcher
    made: str
    match spec.kind:
        case GrammarKind.JSON_OBJECT:
            made = matcher.grammar_from_json_schema({"type": "object"}, JSON_OPTIONS)
        case GrammarKind.JSON_SCHEMA:
            schema = msgspec.json.decode(spec.text)
            if not isinstance(schema, dict | bool):
                raise ValueError("it is no JSON object")
            # Only objects have options: {} is true, and false is refused.
            text = "{}" if schema is True else spec.text
            made = matcher.grammar_from_json_schema(text, JSON_OPTIONS if text != "false" else None)
        case GrammarKind.REGEX:
            made = matcher.grammar_from_regex(spec.text)
        case GrammarKind.CHOICE:
            choices = msgspec.json.decode(spec.text, type=list[str])
            if not choices:
                raise ValueError("it has no text")
            made = matcher.grammar_from_regex("|".join(map(pattern_of, choices)))
        case GrammarKind.GBNF:
            from llguidance.gbnf_to_lark import gbnf_to_lark

            made = matcher.grammar_from_lark(gbnf_to_lark(spec.text))
        case GrammarKind.LARK:
            made = matcher.grammar_from_lark(spec.text)
    return made


def _framed(source: str, frame: str) -> str:
    """``frame`` around it."""
    is_lark = not source.startswith("{")  # which is no rule
    inner = [{"lark_grammar": source}] if is_lark else msgspec.json.decode(source)["grammars"]
    inner[0]["name"] = "inner"
    return _json({"grammars": [{"name": "framed", "lark_grammar": frame}, *inner]})


def _json(value: object) -> str:
    return msgspec.json.encode(value).decode()
