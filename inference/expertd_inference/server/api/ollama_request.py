"""Ollama's requests, and what they are in OpenAI's fields."""

from typing import Any, ClassVar

import msgspec

from expertd_inference.server.api.errors import ApiError, unsupported, wrong_value
from expertd_inference.server.chat.images import WHERE


class Options(msgspec.Struct, kw_only=True):
    """How tokens are chosen. Others of Ollama's say how to load a model, and change nothing."""

    num_predict: int | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int | None = None
    stop: str | list[str] | None = None
    repeat_penalty: float | None = None
    repeat_last_n: int | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    typical_p: float | None = None
    tfs_z: float | None = None
    mirostat: int | None = None
    experts_per_token: int | None = None
    expert_threshold: float | None = None


_OPTIONS = {
    "max_tokens": "options.num_predict",
    "repetition_penalty": "options.repeat_penalty",
    **{
        name: f"options.{name}"
        for name in (
            *("temperature", "top_k", "top_p", "min_p", "seed", "stop"),
            *("presence_penalty", "frequency_penalty", "experts_per_token", "expert_threshold"),
        )
    },
}


class _Asked(msgspec.Struct, kw_only=True):
    names: ClassVar = {
        **_OPTIONS,
        "logprobs": "top_logprobs",
        "reasoning_effort": "think",
        "response_format.json_schema.schema": "format",
        "response_format": "format",
    }
    idle: ClassVar = frozenset({"keep_alive"})
    model: str
    stream: bool | None = True
    options: Options | None = None
    format: str | dict[str, Any] | None = None
    think: bool | str | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None
    keep_alive: float | str | None = None

    @property
    def is_unload(self) -> bool:
        """Whether it wants the model gone, if it asks for nothing else."""
        return str(self.keep_alive).rstrip("smh") in ("0", "0.0")


class OllamaChatRequest(_Asked, kw_only=True):
    """The body of ``/api/chat``."""

    messages: list[dict[str, Any]] | None = None
    tools: list[dict[str, Any]] | None = None


class OllamaGenerateRequest(_Asked, kw_only=True):
    """The body of ``/api/generate``."""

    prompt: str | None = None
    system: str | None = None
    suffix: str | None = None
    template: str | None = None
    context: list[int] | None = None
    images: list[Any] | None = None
    raw: bool = False


def model_name(name: str) -> str:
    """Without the tag that Ollama's clients add."""
    return name.removesuffix(":latest")


def chat_fields(body: OllamaChatRequest) -> dict[str, Any]:
    """The request in OpenAI's fields. Raises ApiError for what is not served."""
    return {**_fields(body), "messages": _messages(body.messages or []), "tools": body.tools}


def generate_fields(body: OllamaGenerateRequest) -> dict[str, Any]:
    """The request in OpenAI's fields: a chat of one message. Raises ApiError likewise."""
    for name in ("template", "context"):
        if getattr(body, name):
            raise unsupported(name, "is not supported; send a chat, or a raw prompt.")
    if body.images and (body.raw or body.suffix):
        raise unsupported("images", "are not supported beside raw and suffix; send a chat.")
    messages = [{"role": "user", "content": _content("images", body.prompt or "", body.images)}]
    if body.system:
        messages.insert(0, {"role": "system", "content": body.system})
    return {**_fields(body), "messages": messages}


def _fields(body: _Asked) -> dict[str, Any]:
    options = body.options or Options()
    if options.mirostat:
        raise unsupported("options.mirostat", "is not supported; use top_p or min_p.")
    for name in ("typical_p", "tfs_z"):
        if getattr(options, name) not in (None, 1.0):
            raise unsupported(f"options.{name}", "is not supported; use top_p or min_p.")
    if options.repeat_penalty not in (None, 1.0) and options.repeat_last_n not in (None, -1):
        raise unsupported(
            "options.repeat_last_n", "may only be -1: repetitions count in the whole text."
        )
    limit = options.num_predict
    fields: dict[str, Any] = {
        "model": model_name(body.model),
        "max_completion_tokens": None if limit is None or limit < 0 else limit,
        "temperature": options.temperature,
        "top_k": options.top_k,
        "top_p": options.top_p,
        "min_p": options.min_p,
        "seed": options.seed,
        "stop": options.stop,
        "repetition_penalty": options.repeat_penalty,
        "presence_penalty": options.presence_penalty,
        "frequency_penalty": options.frequency_penalty,
        "experts_per_token": options.experts_per_token,
        "expert_threshold": options.expert_threshold,
        "logprobs": body.logprobs,
        "top_logprobs": body.top_logprobs if body.logprobs else None,
        "response_format": _format(body.format),
    }
    if isinstance(body.think, bool):
        fields["chat_template_kwargs"] = {"enable_thinking": body.think}
    else:
        fields["reasoning_effort"] = body.think
    return fields


def _format(form: str | dict[str, Any] | None) -> dict[str, Any] | None:
    if not form:
        return None
    if isinstance(form, dict):
        schema = {"name": "answer", "schema": form, "strict": True}
        return {"type": "json_schema", "json_schema": schema}
    if form == "json":
        return {"type": "json_object"}
    raise ApiError(400, f"format is {form!r:.80}; give json or a schema.", param="format")


def _content(where: str, text: Any, images: Any) -> Any:  # noqa: ANN401 - of any JSON
    """A text, or OpenAI's parts with the images, which Ollama has as base64 before it."""
    if not images:
        return text
    if not isinstance(images, list):
        raise wrong_value(where, images, "a list of images in base64")
    parts = [
        {"type": "image", "base64": one, WHERE: f"{where}[{at}]"} for at, one in enumerate(images)
    ]
    return [*parts, {"type": "text", "text": text}]


def _messages(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Ollama's calls have no ids: results follow them in their order, or name their tool."""
    result = []
    waiting: list[tuple[str, str]] = []
    num_calls = 0
    for at, message in enumerate(messages):
        images = message.get("images")
        content = _content(f"messages[{at}].images", message.get("content") or "", images)
        one: dict[str, Any] = {"role": message.get("role"), "content": content}
        if thinking := message.get("thinking"):
            one["reasoning_content"] = thinking
        if calls := message.get("tool_calls"):
            if not isinstance(calls, list):
                raise wrong_value(f"messages[{at}].tool_calls", calls, "a list of calls")
            waiting = []
            one["tool_calls"] = []
            for call in calls:
                function = call.get("function") if isinstance(call, dict) else None
                if not isinstance(function, dict):
                    raise ApiError(
                        400, f"messages[{at}].tool_calls has one without a function; give it one."
                    )
                id_ = f"call_{num_calls}"
                num_calls += 1
                waiting.append((id_, str(function.get("name"))))
                one["tool_calls"].append({"id": id_, "type": "function", "function": function})
        if one["role"] == "tool":
            name = message.get("tool_name") or message.get("name")
            found = next((each for each in waiting if name in (None, each[1])), None)
            if found is not None:
                waiting.remove(found)
                one["tool_call_id"], name = found
            if name is not None:
                one["name"] = name
        result.append(one)
    return result
