"""What a client is told when something is wrong, in the form of the interface that it uses."""

import asyncio
import re
from collections.abc import Container, Mapping
from contextvars import ContextVar
from types import MappingProxyType
from typing import Any

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from expertstore.errors import (
    BusyError,
    DeadlineError,
    ExpertdError,
    InvalidInputError,
    NotFoundError,
    PackError,
    PreconditionError,
    PromptTooLongError,
    SettingError,
    StepFailedError,
    UnavailableError,
)

RETRY_AFTER_SECONDS = 1
MAX_SHOWN = 80
ANTHROPIC = "anthropic-version"
"""A header that Anthropic's clients send, and no others: some paths are several interfaces'."""
NO_NAMES: Mapping[str, str] = MappingProxyType({})
asked_names: ContextVar[Mapping[str, str]] = ContextVar("asked_names", default=NO_NAMES)
"""How the request that this task answers calls fields of OpenAI's chats, where it differs.

A name may begin a longer one; ``[]`` is the place in a list. The first that fits counts.
"""
_OF_SETTINGS = {
    "max_new_tokens": "max_tokens",
    "min_new_tokens": "min_tokens",
    "stop_tokens": "stop_token_ids",
    "allowed_tokens": "allowed_token_ids",
}
"""OpenAI's and vLLM's fields, where those of GenerationSettings have other names."""


class ApiError(Exception):
    """A request cannot be answered: an HTTP ``status``, and OpenAI's fields of an error."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        kind: str = "invalid_request_error",
        code: str | None = None,
        param: str | None = None,
        **more: Any,  # noqa: ANN401 - further fields of the body
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.kind = kind
        self.code = code
        self.param = param
        self.more = more

    def in_names(self, names: Mapping[str, str]) -> "ApiError":
        """The same of the field that the client sent, if it has another name in ``names``."""
        if self.param is None or (said := _said(self.param, names)) == self.param:
            return self
        message = self.message
        if message.startswith(self.param):
            message = said + message.removeprefix(self.param)
        kind, code = self.kind, self.code
        return ApiError(self.status, message, kind=kind, code=code, param=said, **self.more)

    def openai(self) -> dict[str, Any]:
        """The body as OpenAI has it."""
        return {
            "error": {
                "message": self.message,
                "type": self.kind,
                "param": self.param,
                "code": self.code,
                **self.more,
            }
        }

    def anthropic(self) -> dict[str, Any]:
        """The body as Anthropic has it."""
        kinds = {
            401: "authentication_error",
            403: "permission_error",
            404: "not_found_error",
            413: "request_too_large",
            429: "rate_limit_error",
            503: "overloaded_error",
        }
        kind = kinds.get(self.status, "api_error" if self.status >= 500 else self.kind)
        message = self.message
        if {"n_prompt_tokens", "n_ctx"} <= self.more.keys():
            # What agents look for, to make their conversation shorter.
            has, most = self.more["n_prompt_tokens"], self.more["n_ctx"]
            message = f"prompt is too long: {has} tokens > {most} maximum"
        return {"type": "error", "error": {"type": kind, "message": message}}

    def ollama(self) -> dict[str, Any]:
        """The body as Ollama has it."""
        return {"error": self.message}

    def body_for(self, path: str, headers: Container[str] = ()) -> dict[str, Any]:
        """The body in the form of the interface that serves ``path`` to a client of ``headers``."""
        if path.startswith(("/v1/messages", "/messages")) or ANTHROPIC in headers:
            return self.anthropic()
        if path.startswith("/api/"):
            return self.ollama()
        return self.openai()


def shown(value: object) -> str:
    """A value of a request in an error's message, as the client's JSON has it."""
    text = msgspec.json.encode(value).decode()
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


def wrong_value(param: str, value: object, wanted: str = "a text") -> ApiError:
    """A field has a value that is not ``wanted``."""
    return ApiError(400, f"{param} is {shown(value)}; give {wanted}.", param=param)


def unsupported(param: str, why: str) -> ApiError:
    """A field asks for something that is not done here."""
    return ApiError(400, f"{param} {why}", code="unsupported_parameter", param=param)


def _said(name: str, names: Mapping[str, str]) -> str:
    for known, said in names.items():
        pattern = re.escape(known).replace(r"\[\]", r"(\[\d+\])")
        if (found := re.match(rf"{pattern}(?=[.\[]|$)", name)) is not None:
            return said.replace("[]", "".join(found.groups())) + name[found.end() :]
    return name


def api_error_of(error: BaseException) -> ApiError:
    """What an expected failure is to a client, with fields named as the client named them."""
    return _api_error_of(error).in_names(asked_names.get())


def _api_error_of(error: BaseException) -> ApiError:
    message = str(error)
    match error:
        case ApiError():
            return error
        case RecursionError():
            return ApiError(400, "The request is nested too deep; send flatter JSON.")
        case PromptTooLongError():
            return ApiError(
                400,
                f"This model's maximum context length is {error.limit} tokens. However, you "
                f"requested {error.num_tokens + 1} tokens ({error.num_tokens} in the prompt, and "
                "at least 1 in the completion). Please reduce the length of the prompt.",
                code="context_length_exceeded",
                param="messages",
                n_prompt_tokens=error.num_tokens,
                n_ctx=error.limit,
            )
        case SettingError():
            field = _OF_SETTINGS.get(error.setting, error.setting)
            return ApiError(400, field + message.removeprefix(error.setting), param=field)
        case PackError():
            return ApiError(500, message, kind="server_error", code="model_unusable")
        case InvalidInputError():
            return ApiError(400, message)
        case NotFoundError():
            return ApiError(404, message, code="model_not_found", param="model")
        case BusyError():
            return ApiError(429, message, kind="rate_limit_error", code="queue_full")
        case UnavailableError() | DeadlineError() | asyncio.TimeoutError() | PreconditionError():
            return ApiError(503, message, kind="server_error", code="unavailable")
        case StepFailedError() | ExpertdError():
            return ApiError(500, message, kind="server_error", code="engine_failed")
    return ApiError(
        500,
        "The server met an error that it did not expect; its log has it.",
        kind="server_error",
        code="internal_error",
    )


async def answer_error(request: Request, error: Exception) -> Response:
    """For starlette: the response to a request that raised ``error``."""
    failed = api_error_of(error)
    headers = {}
    if failed.status in (429, 503):
        headers["Retry-After"] = str(failed.more.get("retry_after", RETRY_AFTER_SECONDS))
    return Response(
        msgspec.json.encode(failed.body_for(request.url.path, request.headers)),
        failed.status,
        headers,
        "application/json",
    )
