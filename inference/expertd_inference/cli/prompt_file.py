"""The prompts of ``expert-run generate --prompt-file``: one JSON object a line."""

import codecs
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, get_type_hints

import msgspec

from expertd_inference.settings import GenerationSettings, check_prompt
from expertstore.errors import InvalidInputError

STDIN = Path("-")

Prompt = str | list[dict[str, Any]] | list[int]
"""A text, a chat's messages, or token ids."""


class _Message(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    role: str
    content: str


_PROMPTS: dict[str, Any] = {"prompt": str, "messages": list[_Message], "tokens": list[int]}
"""A line has one of these."""

_Line = msgspec.defstruct(
    "Line",
    [
        (name, kind | None, None)
        for name, kind in (_PROMPTS | get_type_hints(GenerationSettings)).items()
    ],
    forbid_unknown_fields=True,
)
"""A line as it is written; settings that it leaves out are those of the command's options."""


@dataclass(frozen=True)
class PromptLine:
    """A prompt, how to continue it, and the number of its line, from 1 on."""

    number: int
    prompt: Prompt
    settings: GenerationSettings
    images: tuple[bytes, ...] = ()
    """The files of the images that its messages have places for."""


def read_prompt_file(path: Path, defaults: GenerationSettings) -> list[PromptLine]:
    """All prompts of the file, or with ``-`` of stdin; empty lines only count.

    Raises InvalidInputError that names the file and the line.
    """
    lines = []
    content = _read(path).removeprefix(codecs.BOM_UTF8)
    for number, text in enumerate(content.splitlines(), start=1):
        if text.strip():
            try:
                lines.append(_prompt_line(number, text, defaults))
            except (InvalidInputError, msgspec.DecodeError, UnicodeDecodeError) as error:
                raise InvalidInputError(
                    f"{_name(path)}, line {number}: {_reason(error)}."
                ) from error
    if not lines:
        raise InvalidInputError(f"{_name(path)} has no prompt; give one JSON object a line.")
    return lines


def _prompt_line(number: int, text: bytes, defaults: GenerationSettings) -> PromptLine:
    line = msgspec.json.decode(text, type=_Line)
    given = {name: value for name in _Line.__struct_fields__ if (value := getattr(line, name))
             is not None}  # fmt: skip
    prompts = [name for name in _PROMPTS if name in given]
    if len(prompts) != 1:
        found = " and ".join(prompts) or "no prompt"
        raise InvalidInputError(f"it has {found}; give one of {', '.join(_PROMPTS)}")
    prompt = given.pop(prompts[0])
    if isinstance(prompt, str):
        check_prompt(prompt)
    elif prompts == ["messages"]:
        prompt = [msgspec.structs.asdict(message) for message in prompt]
    return PromptLine(number, prompt, replace(defaults, **given))


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return f"it is not UTF-8 text ({error.reason})"
    reason = str(error).removesuffix(".")
    is_json = isinstance(error, (InvalidInputError, msgspec.ValidationError))
    return reason if is_json else f"{reason}; give one JSON object a line"


def _read(path: Path) -> bytes:
    try:
        return sys.stdin.buffer.read() if path == STDIN else path.read_bytes()
    except OSError as error:
        raise InvalidInputError(f"{_name(path)} cannot be read: {error.strerror}.") from error


def _name(path: Path) -> str:
    return "stdin" if path == STDIN else str(path)
