"""What ``expert-run generate`` is to continue."""

import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from expertd_inference.cli.prompt_file import PromptLine, read_prompt_file
from expertd_inference.images import check_images
from expertd_inference.settings import GenerationSettings, check_prompt
from expertstore.errors import InvalidInputError


def lines_of(
    prompt: str | None,
    file: Path | None,
    settings: GenerationSettings,
    *,
    chat: bool,
    images: Sequence[Path] = (),
) -> list[PromptLine]:
    """What is to be continued; with ``chat`` a text is a user's message.

    So it is with ``images``, which the message begins with. Raises InvalidInputError.
    """
    if (prompt is None) == (file is None):
        raise InvalidInputError("Give one of --prompt and --prompt-file.")
    if images and file is not None:
        raise InvalidInputError("--image goes with --prompt; leave out --prompt-file.")
    if file is not None:
        lines = read_prompt_file(file, settings)
    else:
        text = _read_stdin() if prompt == "-" else prompt or ""
        check_prompt(text)
        lines = [PromptLine(1, text, settings)]
    if images:
        content = [*[{"type": "image"}] * len(images), {"type": "text", "text": text}]
        message = {"role": "user", "content": content}
        return [PromptLine(1, [message], settings, read_images(images))]
    if not chat:
        return lines
    return [
        replace(line, prompt=[{"role": "user", "content": line.prompt}])
        if isinstance(line.prompt, str)
        else line
        for line in lines
    ]


def read_images(paths: Sequence[Path]) -> tuple[bytes, ...]:
    """The files of ``--image``, checked. Raises InvalidInputError."""
    named = []
    for path in paths:
        try:
            named.append((f"--image {path}", path.read_bytes()))
        except OSError as error:
            raise InvalidInputError(f"--image {path} cannot be read: {error.strerror}.") from error
    check_images(named)
    return tuple(data for _, data in named)


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
