"""OpenAI's messages, as chat templates have them."""

import json
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, TypeGuard

from expertd_inference.server.api.errors import ApiError, shown, wrong_value
from expertd_inference.server.chat.images import IMAGE_PARTS, Images

ROLES = {"system", "developer", "user", "assistant", "tool", "function"}
_TEXT_PARTS = {"text", "input_text", "output_text", "refusal"}


def for_template(messages: Sequence[dict[str, Any]], images: Images) -> list[dict[str, Any]]:
    """The messages, with contents of one text and arguments of tool calls as objects.

    Where a user's message has images, which ``images`` takes, its content stays in parts. Raises
    ApiError for a message that is none, and for one of sounds.
    """
    if not messages:
        raise ApiError(400, "messages is empty; give at least one.", param="messages")
    return [_one(f"messages[{at}]", message, images) for at, message in enumerate(messages)]


def in_turns(
    messages: Sequence[dict[str, Any]], *, first_system: bool = True
) -> list[dict[str, Any]]:
    """Messages of :func:`for_template` for a template that takes user and assistant in turns.

    Only the beginning of the chat is the system's, or nothing without ``first_system``: what else
    it says the user says. Messages side by side of one role are joined, but for those with calls of
    tools and their results.
    """
    joined: list[dict[str, Any]] = []
    for message in messages:
        last = joined[-1] if joined else None
        role = message["role"]
        begins = first_system and (last is None or last["role"] == "system")
        if role == "system" and not begins:
            role = "user"
        if last is not None and role == last["role"] and _may_join(last) and _may_join(message):
            joined[-1] = {**last, "content": _joined(last["content"], message["content"])}
        else:
            joined.append({**message, "role": role})
    return joined


def _may_join(message: dict[str, Any]) -> bool:
    return message["role"] in ("system", "user", "assistant") and not message.get("tool_calls")


def _joined(first: Any, second: Any) -> Any:  # noqa: ANN401 - texts, or lists of parts
    if isinstance(first, str) and isinstance(second, str):
        return f"{first}\n\n{second}"
    return [*_parts(first), {"type": "text", "text": "\n\n"}, *_parts(second)]


def _parts(content: Any) -> list[dict[str, Any]]:  # noqa: ANN401
    return [{"type": "text", "text": content}] if isinstance(content, str) else content


def _one(where: str, message: dict[str, Any], images: Images) -> dict[str, Any]:
    role = message.get("role")
    if role not in ROLES:
        raise wrong_value(f"{where}.role", role, f"one of {', '.join(sorted(ROLES))}")
    content = message.get("content")
    if role == "user" and has_images(content):
        said: Any = _with_images(f"{where}.content", content, images)
    else:
        said = "" if content is None else text_of(f"{where}.content", content)
    result = {**message, "content": said}
    if role == "developer":
        # Which is what models were trained to know it by.
        result["role"] = "system"
    reasoning = message.get("reasoning_content") or message.get("reasoning")
    if isinstance(reasoning, str):
        result["reasoning_content"] = result["reasoning"] = reasoning
    if calls := message.get("tool_calls"):
        if not isinstance(calls, list):
            raise wrong_value(f"{where}.tool_calls", calls, "a list of calls")
        result["tool_calls"] = [_call(f"{where}.tool_calls[{at}]", one)
                                for at, one in enumerate(calls)]  # fmt: skip
    return result


def has_images(content: Any) -> TypeGuard[list[Any]]:  # noqa: ANN401 - of any JSON
    """Whether a part of a content is an image."""
    return isinstance(content, list) and any(
        isinstance(part, dict) and part.get("type") in IMAGE_PARTS for part in content
    )


def _with_images(where: str, content: list[Any], images: Images) -> list[dict[str, Any]]:
    """The parts as templates know them."""
    parts = []
    for at, part in enumerate(content):
        if isinstance(part, dict) and part.get("type") in IMAGE_PARTS:
            images.take(f"{where}[{at}]", part)
            parts.append({"type": "image"})
        else:
            parts.append({"type": "text", "text": text_of(where, [part], at)})
    return parts


def text_of(where: str, content: Any, first: int = 0) -> str:  # noqa: ANN401 - of any JSON
    """The text of a content, which may be in parts, numbered from ``first`` on.

    Raises ApiError that says ``where``.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong_value(where, content, "a text, or a list of parts")
    texts = []
    for at, part in enumerate(content, start=first):
        kind = part.get("type") if isinstance(part, dict) else None
        if isinstance(part, str):
            texts.append(part)
        elif kind in _TEXT_PARTS:
            text = part.get("text", part.get("refusal"))
            if not isinstance(text, str):
                raise wrong_value(f"{where}[{at}].text", text)
            texts.append(text)
        else:
            raise ApiError(
                400,
                f"{where}[{at}] is of type {shown(kind)}, and this server takes text here, and "
                "images in messages of the user.",
                code="unsupported_content",
                param=where,
            )
    return "\n".join(texts)


def _call(where: str, call: Any) -> dict[str, Any]:  # noqa: ANN401 - of any JSON
    function = call.get("function") if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise ApiError(400, f"{where} has no function with a name; give one.", param=where)
    arguments = function.get("arguments", "")
    if isinstance(arguments, str):
        with suppress(ValueError):  # As the model wrote it; the template shows it so.
            arguments = json.loads(arguments or "{}")
    return {**call, "function": {**function, "arguments": arguments}}
