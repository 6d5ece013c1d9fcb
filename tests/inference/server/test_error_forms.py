"""What a client is told of a failure."""

import json

import httpx2
import pytest
from starlette.requests import Request

from expertd_inference.server.api.errors import ApiError, answer_error, api_error_of
from expertd_inference.server.app import make_app
from expertd_inference.server.batches.batches import BatchRoom
from expertd_inference.server.front import Front
from expertd_inference.server.metrics import ServerMetrics
from expertstore.errors import (
    BusyError,
    DeadlineError,
    ExpertdError,
    InvalidInputError,
    NotFoundError,
    PackError,
    PreconditionError,
    PromptTooLongError,
    StepFailedError,
    UnavailableError,
)


@pytest.mark.parametrize(
    ("error", "status", "code"),
    [
        (InvalidInputError("Why."), 400, None),
        (NotFoundError("Why."), 404, "model_not_found"),
        (BusyError("Why."), 429, "queue_full"),
        (PackError("Why."), 500, "model_unusable"),
        (StepFailedError("Why."), 500, "engine_failed"),
        (ExpertdError("Why."), 500, "engine_failed"),
        (UnavailableError("Why."), 503, "unavailable"),
        (DeadlineError("Why."), 503, "unavailable"),
        (PreconditionError("Why."), 503, "unavailable"),
        (TimeoutError("Why."), 503, "unavailable"),
    ],
    ids=lambda one: type(one).__name__ if isinstance(one, Exception) else "",
)
def test_an_expected_failure_says_why(error: Exception, status: int, code: str | None) -> None:
    told = api_error_of(error)
    assert (told.status, told.message, told.code) == (status, "Why.", code)
    kinds = {400: "invalid_request_error", 404: "invalid_request_error", 429: "rate_limit_error"}
    assert told.kind == kinds.get(status, "server_error")


def test_a_mistake_of_ours_says_nothing_of_itself() -> None:
    told = api_error_of(KeyError("a secret"))
    assert (told.status, told.kind, told.code) == (500, "server_error", "internal_error")
    assert "secret" not in told.message


def test_json_that_is_nested_too_deep() -> None:
    assert (api_error_of(RecursionError()).status, api_error_of(RecursionError()).code) == (
        400,
        None,
    )


async def test_a_request_nested_too_deep_is_not_logged_as_a_mistake_of_ours(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def nested(_: BatchRoom) -> None:
        raise RecursionError

    monkeypatch.setattr(BatchRoom, "batches", property(nested))
    front = Front(None, ServerMetrics(), lambda _: None)  # type: ignore[arg-type]
    # It raises what the server would log.
    transport = httpx2.ASGITransport(make_app(front))
    async with httpx2.AsyncClient(transport=transport, base_url="http://server") as client:
        assert (await client.get("/v1/files")).status_code == 400


def test_what_was_said_stays() -> None:
    error = ApiError(418, "Why.")
    assert api_error_of(error) is error


def test_a_long_prompt_is_told_in_the_words_that_agents_look_for() -> None:
    told = api_error_of(PromptTooLongError("Why.", num_tokens=12, limit=10))
    assert told.openai() == {
        "error": {
            "message": "This model's maximum context length is 10 tokens. However, you requested "
            "13 tokens (12 in the prompt, and at least 1 in the completion). Please reduce the "
            "length of the prompt.",
            "type": "invalid_request_error",
            "param": "messages",
            "code": "context_length_exceeded",
            "n_prompt_tokens": 12,
            "n_ctx": 10,
        }
    }
    assert told.anthropic()["error"]["message"] == "prompt is too long: 12 tokens > 10 maximum"


@pytest.mark.parametrize(
    ("status", "kind"),
    [
        (400, "invalid_request_error"),
        (401, "authentication_error"),
        (403, "permission_error"),
        (404, "not_found_error"),
        (413, "request_too_large"),
        (429, "rate_limit_error"),
        (499, "invalid_request_error"),
        (500, "api_error"),
        (501, "api_error"),
        (503, "overloaded_error"),
    ],
)
def test_anthropic_s_kinds(status: int, kind: str) -> None:
    assert ApiError(status, "Why.").anthropic() == {
        "type": "error",
        "error": {"type": kind, "message": "Why."},
    }


@pytest.mark.parametrize(
    ("path", "form"),
    [
        ("/v1/messages", "anthropic"),
        ("/v1/messages/count_tokens", "anthropic"),
        ("/messages", "anthropic"),
        ("/api/chat", "ollama"),
        ("/v1/chat/completions", "openai"),
        ("/apis", "openai"),
    ],
)
async def test_each_interface_has_its_form(path: str, form: str) -> None:
    error = ApiError(400, "Why.")
    assert error.body_for(path, {}) == getattr(error, form)()
    answer = await answer_error(request(path), error)
    assert json.loads(answer.body) == getattr(error, form)()
    assert answer.status_code == 400
    assert "retry-after" not in answer.headers


@pytest.mark.parametrize("status", [429, 503])
async def test_when_to_come_again(status: int) -> None:
    for error, seconds in (
        (ApiError(status, "Why."), "1"),
        (ApiError(status, "Why.", retry_after=7), "7"),
    ):
        answer = await answer_error(request("/v1/models"), error)
        assert answer.headers["retry-after"] == seconds


def request(path: str) -> Request:
    return Request({"type": "http", "path": path, "headers": [], "server": ("here", 80)})
