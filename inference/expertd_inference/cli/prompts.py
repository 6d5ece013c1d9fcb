"""What ``expert-run generate`` is to continue."""

import sys
from dataclasses import replace
from pathlib import Path

from expertd_inference.cli.prompt_file import PromptLine, read_prompt_file
from expertd_inference.settings import GenerationSettings, check_prompt
from expertstore.errors import InvalidInputError


def lines_of(
    prompt: str | None, file: Path | None, settings: GenerationSettings, *, chat: bool
) -> list[PromptLine]:
    """What is to be continued; with ``chat`` a text is a user's message."""
    if (prompt is None) == (file is None):
        raise InvalidInputError("Give one of --prompt and --prompt-file.")
    if file is not None:
        lines = read_prompt_file(file, settings)
    else:
        text = _read_stdin() if prompt == "-" else prompt or ""
        check_prompt(text)
        lines = [PromptLine(1, text, settings)]
    if not chat:
        return lines
    return [
        replace(line, prompt=[{"role": "user", "content": line.prompt}])
        if isinstance(line.prompt, str)
        else line
        for line in lines
    ]


def _read_stdin() -> str:
    """The prompt from a pipe. Raises InvalidInputError if it is not text or cannot be read."""
    try:
        return sys.stdin.buffer.read().decode()
    except OSError as error:
        raise InvalidInputError(
            f"The prompt cannot be read from stdin: {error.strerror}."
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"The prompt on stdin is not UTF-8 text: {error}.") from error
