"""Anthropic's request of a message, and what it is in OpenAI's fields."""

import json
from collections.abc import Iterator
from typing import Any, ClassVar

import msgspec

from expertd_inference.server.api.errors import ApiError, shown, unsupported, wrong_value
from expertd_inference.server.chat.images import WHERE

_TEXT_OR_BLOCKS = "a text, or a list of blocks"
_TOOL_CHOICES = {"auto": "auto", "any": "required", "none": "none"}


class Thinking(msgspec.Struct, kw_only=True):
    """Whether to think, and whether its text is wanted."""

    idle: ClassVar = frozenset({"budget_tokens"})
    type: str | None = None
    budget_tokens: int | None = None
    display: str | None = None


class MessagesRequest(msgspec.Struct, kw_only=True):
    """The body of ``/v1/messages``, and of ``count_tokens``, which has no ``max_tokens``."""

    names: ClassVar = {
        "stop": "stop_sequences",
        "reasoning_effort": "output_config.effort",
        "response_format.json_schema": "output_config.format",
        "response_format": "output_config.format",
        "tools[].function.parameters": "tools[].input_schema",
        "tools[].function": "tools[]",
    }
    idle: ClassVar = frozenset(
        {
            *("metadata", "service_tier", "inference_geo", "context_management", "cache_control"),
            "speed",
        }
    )
    messages: list[dict[str, Any]]
    model: str | None = None
    max_tokens: int | None = None
    system: str | list[dict[str, Any]] | None = None
    stream: bool | None = False
    stop_sequences: list[str] | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: dict[str, Any] | None = None
    thinking: Thinking | None = None
    output_config: dict[str, Any] | None = None
    container: Any = None
    mcp_servers: list[Any] | None = None
    # Ours.
    experts_per_token: int | None = None
    expert_threshold: float | None = None
    # These are idle.
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    inference_geo: str | None = None
    context_management: dict[str, Any] | None = None
    cache_control: dict[str, Any] | None = None
    speed: str | None = None

    @property
    def shows_thinking(self) -> bool:
        """Whether the text of thinking is wanted."""
        return self.thinking is None or self.thinking.display != "omitted"


def openai_fields(body: MessagesRequest) -> dict[str, Any]:
    """The request in OpenAI's fields. Raises ApiError for what is not served."""
    if body.container is not None:
        raise unsupported("container", "is not supported: this server runs no code.")
    if body.mcp_servers:
        raise unsupported("mcp_servers", "is not supported: connect to them in your client.")
    messages = [one for at, message in enumerate(body.messages) for one in _messages(at, message)]
    _name_tools(messages)
    if body.system:
        messages.insert(0, {"role": "system", "content": _text("system", body.system)})
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "max_completion_tokens": body.max_tokens,
        "stop": body.stop_sequences,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": body.top_k,
        "experts_per_token": body.experts_per_token,
        "expert_threshold": body.expert_threshold,
        **_thinking(body.thinking),
        **_output(body.output_config or {}),
    }
    if messages and messages[-1]["role"] == "assistant":
        # Anthropic's way to give the beginning of an answer.
        fields |= {"continue_final_message": True, "add_generation_prompt": False}
    if body.tools:
        fields["tools"] = [_tool(f"tools[{at}]", tool) for at, tool in enumerate(body.tools)]
    if body.tools or body.tool_choice is not None:
        fields |= _tool_choice(body.tool_choice or {"type": "auto"})
    return fields


def _messages(at: int, message: dict[str, Any]) -> Iterator[dict[str, Any]]:
    where = f"messages[{at}]"
    role, content = message.get("role"), message.get("content")
    if role not in ("user", "assistant", "system"):
        raise wrong_value(f"{where}.role", role, "user or assistant")
    if isinstance(content, str):
        yield {"role": role, "content": content}
        return
    if not isinstance(content, list):
        raise wrong_value(f"{where}.content", content, _TEXT_OR_BLOCKS)
    if role == "assistant":
        yield _assistant(f"{where}.content", content)
        return
    parts: list[dict[str, Any]] = []
    for number, block in enumerate(content):
        place = f"{where}.content[{number}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "tool_result":
            if parts:
                yield {"role": role, "content": _said(parts)}
                parts = []
            yield _tool_result(place, block)
        elif kind == "image" and role == "user":
            parts.append({**block, WHERE: place})
        else:
            parts.append({"type": "text", "text": _text_block(place, block)})
    if parts:
        yield {"role": role, "content": _said(parts)}


def _said(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """One text, unless there are images."""
    texts = [part["text"] for part in parts if part["type"] == "text"]
    return "\n".join(texts) if len(texts) == len(parts) else parts


def _assistant(where: str, blocks: list[Any]) -> dict[str, Any]:
    texts, thoughts, calls = [], [], []
    for at, block in enumerate(blocks):
        place = f"{where}[{at}]"
        kind = block.get("type") if isinstance(block, dict) else None
        if kind == "thinking":
            thoughts.append(_field(place, block, "thinking"))
        elif kind == "redacted_thinking":
            continue
        elif kind == "tool_use":
            function = {
                "name": _field(place, block, "name"),
                "arguments": json.dumps(block.get("input", {}), ensure_ascii=False),
            }
            calls.append(
                {"id": _field(place, block, "id"), "type": "function", "function": function}
            )
        else:
            texts.append(_text_block(place, block))
    message: dict[str, Any] = {"role": "assistant", "content": "".join(texts)}
    if thoughts:
        message["reasoning_content"] = "\n".join(thoughts)
    if calls:
        message["tool_calls"] = calls
    return message


def _tool_result(where: str, block: dict[str, Any]) -> dict[str, Any]:
    content = _text(f"{where}.content", block.get("content") or "")
    if block.get("is_error"):
        content = f"Error: {content}"
    return {
        "role": "tool",
        "tool_call_id": _field(where, block, "tool_use_id"),
        "content": content,
    }


def _name_tools(messages: list[dict[str, Any]]) -> None:
    """Some templates want a result's tool by name; Anthropic's results have the call's id only."""
    names = {
        call["id"]: call["function"]["name"]
        for message in messages
        for call in message.get("tool_calls", ())
    }
    for message in messages:
        if (name := names.get(message.get("tool_call_id"))) is not None:
            message["name"] = name


def _text(where: str, content: Any) -> str:  # noqa: ANN401 - of any JSON
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise wrong_value(where, content, _TEXT_OR_BLOCKS)
    return "\n".join(_text_block(f"{where}[{at}]", block) for at, block in enumerate(content))


def _text_block(where: str, block: Any) -> str:  # noqa: ANN401
    kind = block.get("type") if isinstance(block, dict) else None
    if kind != "text":
        raise ApiError(
            400,
            f"{where} is of type {shown(kind)}, and this server takes text, tool_use, tool_result, "
            "thinking, and images of the user only.",
            param=where,
        )
    return _field(where, block, "text")


def _field(where: str, block: dict[str, Any], name: str) -> str:
    value = block.get(name)
    if not isinstance(value, str):
        raise wrong_value(f"{where}.{name}", value)
    return value


def _tool(where: str, tool: dict[str, Any]) -> dict[str, Any]:
    kind = tool.get("type")
    if kind not in (None, "custom"):
        raise unsupported(
            where,
            f"is of type {shown(kind)}, which this server cannot run; give tools of your own.",
        )
    function = {
        "name": _field(where, tool, "name"),
        "description": tool.get("description") or "",
        "parameters": tool.get("input_schema") or {"type": "object", "properties": {}},
    }
    if isinstance(strict := tool.get("strict"), bool):
        function["strict"] = strict
    return {"type": "function", "function": function}


def _tool_choice(choice: dict[str, Any]) -> dict[str, Any]:
    kind = choice.get("type")
    fields: dict[str, Any] = {}
    if kind == "tool":
        name = _field("tool_choice", choice, "name")
        fields["tool_choice"] = {"type": "function", "function": {"name": name}}
    elif kind in _TOOL_CHOICES:
        fields["tool_choice"] = _TOOL_CHOICES[kind]
    else:
        raise ApiError(
            400,
            f"tool_choice.type is {shown(kind)}; give auto, any, tool or none.",
            param="tool_choice",
        )
    if choice.get("disable_parallel_tool_use"):
        fields["parallel_tool_calls"] = False
    return fields


def _thinking(thinking: Thinking | None) -> dict[str, Any]:
    """Whether to think is the template's to do; how long the model thinks is its own affair."""
    if thinking is None or (kind := thinking.type) is None:
        return {}
    if kind not in ("enabled", "disabled", "adaptive"):
        raise ApiError(
            400,
            f"thinking.type is {shown(kind)}; give enabled, adaptive or disabled.",
            param="thinking",
        )
    return {"chat_template_kwargs": {"enable_thinking": kind != "disabled"}}


def _output(config: dict[str, Any]) -> dict[str, Any]:
    fields: dict[str, Any] = {"reasoning_effort": config.get("effort")}
    if (form := config.get("format")) is not None:
        if not isinstance(form, dict) or form.get("type") != "json_schema":
            raise unsupported("output_config.format", "may only be of type json_schema.")
        schema = {"name": "answer", "schema": form.get("schema"), "strict": True}
        fields["response_format"] = {"type": "json_schema", "json_schema": schema}
    return fields
