"""OpenAI's request of a response, and what it is in the fields of a chat."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import msgspec

from expertd_inference.server.api.errors import ApiError, shown, unsupported, wrong_value
from expertd_inference.server.api.sampling_fields import StreamOptions
from expertd_inference.server.chat.images import WHERE
from expertd_inference.server.chat.messages import has_images, text_of
from expertd_inference.server.front import new_id

LOGPROBS = "message.output_text.logprobs"
Item = dict[str, Any]
_ROLES = ("user", "assistant", "system", "developer")
_VLLM = (
    "priority",
    "cache_salt",
    "top_k",
    "min_p",
    "repetition_penalty",
    "seed",
    "stop",
    "ignore_eos",
    # Ours.
    "experts_per_token",
    "expert_threshold",
)


class TextConfig(msgspec.Struct, kw_only=True):
    """What form the text has."""

    idle: ClassVar = frozenset({"verbosity"})
    format: dict[str, Any] | None = None
    verbosity: str | None = None


class Reasoning(msgspec.Struct, kw_only=True):
    """How much to think. Nothing here writes summaries."""

    idle: ClassVar = frozenset({"summary"})
    effort: str | None = None
    summary: str | None = None


class ResponsesRequest(msgspec.Struct, kw_only=True):
    """The body of ``/v1/responses``, and of ``input_tokens``."""

    names: ClassVar = {
        "messages": "input",
        "max_tokens": "max_output_tokens",
        "logprobs": "top_logprobs",
        "reasoning_effort": "reasoning.effort",
        "response_format.json_schema": "text.format",
        "response_format": "text.format",
        "tools[].function": "tools[]",
    }
    idle: ClassVar = frozenset(
        {
            *("max_tool_calls", "prompt_cache_key", "prompt_cache_retention"),
            *("safety_identifier", "service_tier", "user", "stream_options"),
        }
    )
    input: str | list[Item] | None = None
    model: str | None = None
    instructions: str | None = None
    previous_response_id: str | None = None
    store: bool | None = True
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    include: list[str] | None = None
    max_output_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_logprobs: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    tools: list[dict[str, Any]] | None = None
    tool_choice: str | dict[str, Any] | None = None
    parallel_tool_calls: bool | None = None
    text: TextConfig | None = None
    reasoning: Reasoning | None = None
    metadata: dict[str, str] | None = None
    background: bool | None = False
    conversation: Any = None
    prompt: Any = None
    context_management: list[Any] | None = None
    truncation: str | None = None
    # vLLM's.
    priority: int = 0
    cache_salt: str | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    ignore_eos: bool = False
    experts_per_token: int | None = None
    expert_threshold: float | None = None
    # These are idle.
    max_tool_calls: int | None = None  # of tools that the server runs: there are none
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    safety_identifier: str | None = None
    service_tier: str | None = None
    user: str | None = None

    @property
    def wants_logprobs(self) -> bool:
        """Whether tokens come with their log-probabilities."""
        return LOGPROBS in (self.include or ()) or bool(self.top_logprobs)


def refuse_unserved(body: ResponsesRequest) -> None:
    """Raises ApiError for what would change the answer, and is not done here."""
    if body.background:
        raise unsupported("background", "is not supported; stream the response, or use batches.")
    if body.conversation is not None:
        raise unsupported("conversation", "is not supported; give previous_response_id.")
    if body.prompt is not None:
        raise unsupported("prompt", "is not supported: no templates are stored; send the text.")
    if body.context_management:
        raise unsupported("context_management", "is not supported; send a shorter input.")
    if body.truncation not in (None, "disabled"):
        raise unsupported("truncation", "may only be disabled; send a shorter input.")


def openai_fields(body: ResponsesRequest, earlier: Sequence[Item]) -> dict[str, Any]:
    """The request as a chat, after the messages of ``earlier`` responses. Raises ApiError."""
    messages = [*earlier, *messages_of(body.input, earlier)]
    if body.instructions:
        messages.insert(0, {"role": "system", "content": body.instructions})
    text = body.text or TextConfig()
    reasoning = body.reasoning or Reasoning()
    fields: dict[str, Any] = {
        "model": body.model,
        "messages": messages,
        "max_completion_tokens": body.max_output_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "presence_penalty": body.presence_penalty,
        "frequency_penalty": body.frequency_penalty,
        "logprobs": True if body.wants_logprobs else None,
        "top_logprobs": body.top_logprobs if body.wants_logprobs else None,
        "reasoning_effort": reasoning.effort,
        "response_format": _format(text.format),
    }
    fields |= {name: getattr(body, name) for name in _VLLM}
    if body.tools:
        fields["tools"] = _tools(body.tools)
    fields["tool_choice"] = _tool_choice(body.tool_choice)
    fields["parallel_tool_calls"] = body.parallel_tool_calls
    return fields


def namespaces_of(tools: Sequence[Item] | None) -> dict[str, str]:
    """The namespaces of functions that are in one; the tools are those of :func:`openai_fields`."""
    groups = [tool for tool in tools or () if tool["type"] == "namespace"]
    return {tool["name"]: group["name"] for group in groups for tool in group["tools"]}


def messages_of(given: str | Sequence[Item] | None, earlier: Sequence[Item] = ()) -> list[Item]:
    """Input as messages of a chat; none is an empty text of the user's. Raises ApiError.

    ``earlier`` messages may have the calls that outputs belong to.
    """
    if given is None or isinstance(given, str):
        return [{"role": "user", "content": given or ""}]
    messages: list[Item] = []
    for at, item in enumerate(given):
        where = f"input[{at}]"
        kind = item.get("type", "message")
        if kind == "message":
            _add_message(messages, where, item)
        elif kind == "reasoning":
            messages.append({"role": "assistant", "content": "", "reasoning_content": _of(item)})
        elif kind == "function_call":
            function = {name: _field(where, item, name) for name in ("name", "arguments")}
            call = {"id": _field(where, item, "call_id"), "type": "function", "function": function}
            if not (messages and messages[-1]["role"] == "assistant"):
                messages.append({"role": "assistant", "content": ""})
            messages[-1].setdefault("tool_calls", []).append(call)
        elif kind == "function_call_output":
            messages.append(_output([*earlier, *messages], where, item))
        else:
            raise unsupported(
                where,
                f"is of type {shown(kind)}; this server takes message, function_call, "
                "function_call_output and reasoning.",
            )
    return messages


def items_of(given: str | Sequence[Item] | None) -> list[Item]:
    """Input as the items that a client may ask for again, each with an id."""
    if given is None or isinstance(given, str):
        given = [{"role": "user", "content": given or ""}]
    items = []
    for item in given:
        kind = item.get("type", "message")
        one = {"id": new_id("msg_" if kind == "message" else "item_"), "type": kind, **item}
        one.setdefault("status", "completed")
        if isinstance(text := item.get("content"), str):
            said = "output_text" if item.get("role") == "assistant" else "input_text"
            one["content"] = [{"type": said, "text": text}]
        items.append(one)
    return items


def _add_message(messages: list[Item], where: str, item: Item) -> None:
    if (role := item.get("role")) not in _ROLES:
        raise wrong_value(f"{where}.role", role, f"one of {', '.join(_ROLES)}")
    content = item.get("content")
    if role == "user" and has_images(content):
        content = [
            {**part, WHERE: f"{where}.content[{at}]"} if isinstance(part, dict) else part
            for at, part in enumerate(content)
        ]
    else:
        content = text_of(f"{where}.content", content)
    message = {"role": role, "content": content}
    last = messages[-1] if messages else {}
    thinks = last.get("reasoning_content") and not last["content"] and "tool_calls" not in last
    if role == "assistant" and thinks:
        # The reasoning before it is this message's.
        last["content"] = content
    else:
        messages.append(message)


def _output(messages: Sequence[Item], where: str, item: Item) -> Item:
    output = text_of(f"{where}.output", item.get("output"))
    call_id = _field(where, item, "call_id")
    message = {"role": "tool", "tool_call_id": call_id, "content": output}
    for earlier in messages:
        for call in earlier.get("tool_calls", ()):
            if call["id"] == call_id:
                message["name"] = call["function"]["name"]
    return message


def _of(item: Item) -> str:
    """The text of reasoning, or of its summary."""
    parts = item.get("content") or item.get("summary") or ()
    return "\n".join(str(part.get("text", "")) for part in parts if isinstance(part, dict))


def _field(where: str, item: Item, name: str) -> str:
    value = item.get(name)
    if not isinstance(value, str):
        raise wrong_value(f"{where}.{name}", value)
    return value


def _tools(tools: Sequence[Item]) -> list[Item]:
    """All functions; models know those of a namespace by their own names."""
    functions: dict[str, Item] = {}
    for at, tool in enumerate(tools):
        where = f"tools[{at}]"
        group: Any = [tool]
        if in_one := tool.get("type") == "namespace":
            _field(where, tool, "name")
            group = tool.get("tools")
            if not isinstance(group, list) or not all(isinstance(one, dict) for one in group):
                raise wrong_value(f"{where}.tools", group, "a list of functions")
        for number, one in enumerate(group):
            place = f"{where}.tools[{number}]" if in_one else where
            function = _tool(place, one)
            name = _field(place, one, "name")
            if name in functions:
                raise ApiError(
                    400, f"{place} has the name {name!r} of another; give it its own.", param=where
                )
            functions[name] = function
    return [*functions.values()]


def _tool(where: str, tool: Mapping[str, Any]) -> dict[str, Any]:
    if tool.get("type") != "function":
        raise unsupported(
            where,
            f"is of type {shown(tool.get('type'))}; this server runs no tools: it takes functions "
            "only.",
        )
    return {"type": "function", "function": {name: value for name, value in tool.items()
                                             if name != "type"}}  # fmt: skip


def _tool_choice(choice: str | Mapping[str, Any] | None) -> Any:  # noqa: ANN401 - JSON
    if choice is None or isinstance(choice, str):
        return choice
    kind = choice.get("type")
    if kind == "function":
        return {"type": "function", "function": {"name": choice.get("name")}}
    if kind == "allowed_tools":
        tools = [
            {"type": "function", "function": {"name": tool.get("name")}}
            for tool in choice.get("tools", ())
        ]
        return {
            "type": "allowed_tools",
            "allowed_tools": {"mode": choice.get("mode", "auto"), "tools": tools},
        }
    raise unsupported(
        "tool_choice",
        f"is of type {shown(kind)}; give none, auto, required, a function or allowed_tools.",
    )


def _format(form: Mapping[str, Any] | None) -> dict[str, Any] | None:
    if form is None or form.get("type") == "text":
        return None
    if form.get("type") == "json_schema":
        schema = {name: value for name, value in form.items() if name != "type"}
        return {"type": "json_schema", "json_schema": schema}
    return {**form}
