"""A prompt's way to tokens: the pack's tokenizer, its chat template, and the model's embeddings."""

import reprlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from expertd_inference.process.reasons import reason_of
from expertd_inference.settings import check_prompt
from expertstore.errors import InvalidInputError, PackError


def encode(
    model: Any,  # noqa: ANN401 - transformers is untyped
    tokenizer: Any,  # noqa: ANN401
    prompt: str | Sequence[Mapping[str, Any]],
) -> list[int]:
    """The tokens of a text, or of a chat's messages in the tokenizer's chat template.

    A message has a ``role`` and its ``content``: a text, or parts of it, ``{"type": "image"}`` and
    ``{"type": "text", "text": ...}``. Raises InvalidInputError for a prompt that is no
    text, has no tokens or has tokens that the model does not, and for messages if there is no
    template, or none that takes them.
    """
    if isinstance(prompt, str):
        check_prompt(prompt)
        ids = _ids(model, tokenizer, prompt)
    else:
        for message in prompt:
            _check_message(message)
        ids = _in_template(model, tokenizer, prompt)
    if not ids:
        raise InvalidInputError("The prompt is empty; this model needs at least one token.")
    rows = model.get_input_embeddings().num_embeddings
    if not 0 <= min(ids) <= max(ids) < rows:
        token = min(ids) if min(ids) < 0 else max(ids)
        raise InvalidInputError(
            f"The prompt has token {token} ({_text_of(tokenizer, token)}), and the model has "
            f"embeddings for 0 to {rows - 1}: the tokenizer of {model.name_or_path} has tokens "
            "that the model does not know; leave that one out."
        )
    return ids


def _check_message(message: object) -> None:
    content = message.get("content") if isinstance(message, Mapping) else None
    texts = [content]
    if isinstance(content, Sequence) and not isinstance(content, str):
        parts = [part for part in content if part != {"type": "image"}]
        texts = [part.get("text") if isinstance(part, Mapping) else None for part in parts]
    if (
        not isinstance(message, Mapping)
        or not isinstance(message.get("role"), str)
        or not all(isinstance(text, str) for text in texts)
    ):
        raise InvalidInputError(
            "A message of a chat has a role and its content, which are texts; this one is "
            f"{reprlib.repr(message)}."
        )
    for text in texts:
        check_prompt(str(text))


def _text_of(tokenizer: Any, token: int) -> str:  # noqa: ANN401
    try:
        return repr(tokenizer.convert_ids_to_tokens(token))
    except (OverflowError, LookupError, TypeError, ValueError):
        return "without a text"


def _ids(model: Any, tokenizer: Any, prompt: str) -> list[int]:  # noqa: ANN401
    try:
        ids: list[int] = tokenizer(prompt).input_ids
    except Exception as error:  # the tokenizers library has none but Exception
        raise PackError(
            f"The tokenizer of {model.name_or_path} fails: {reason_of(error)}; copy its files "
            "again."
        ) from error
    return ids


def _in_template(
    model: Any,  # noqa: ANN401
    tokenizer: Any,  # noqa: ANN401
    messages: Sequence[Mapping[str, Any]],
) -> list[int]:
    if not tokenizer.chat_template:
        raise InvalidInputError(
            f"The model {Path(model.name_or_path).name} has no chat template, which messages and "
            "--chat need; give the prompt as a text."
        )
    try:
        ids: list[int] = tokenizer.apply_chat_template(
            [dict(message) for message in messages], add_generation_prompt=True, return_dict=False
        )
    except Exception as error:  # a template is a program, and may fail in any way
        raise InvalidInputError(
            f"The chat template of {model.name_or_path} does not take {_described(messages)}: "
            f"{reason_of(error)}; leave out --chat and write the prompt in the model's own "
            "format, or mend the template."
        ) from error
    return ids


def _described(messages: Sequence[Mapping[str, Any]]) -> str:
    roles = [message["role"] for message in messages]
    return "one message of a user" if roles == ["user"] else f"messages of {', '.join(roles)}"
