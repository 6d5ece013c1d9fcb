"""What the clients of the campaign ask, and what of an answer must be the same every time."""

import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

HELDOUT = Path(__file__).parents[2] / "examples/tiny-mixtral/heldout.txt"
MODEL = "example"
SECONDS = 240.0
"""No answer may take longer, however often its engine is killed."""
NUM_REQUESTS = 32

_SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 12},
        "sizes": {"type": "array", "items": {"type": "integer"}, "minItems": 3, "maxItems": 6},
        "kind": {"enum": ["short", "long"]},
    },
    "required": ["name", "sizes", "kind"],
    "additionalProperties": False,
}
_FORMAT = {"type": "json_schema", "json_schema": {"name": "thing", "schema": _SCHEMA}}
_TEXTS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "top_p": 0.9, "top_k": 40},
    {"temperature": 0.8, "n": 2, "logprobs": 2},
    {"temperature": 0.0, "stop": ["self", "\n\n"], "logprobs": 0},
    {"temperature": 1.0, "frequency_penalty": 0.7, "presence_penalty": 0.3, "min_p": 0.02},
    {"temperature": 0.8, "echo": True, "logprobs": 3},
    {"temperature": 0.7, "structured_outputs": {"regex": "[a-z]{4,12}(, [a-z]{4,12}){3,9}"}},
    {"temperature": 0.0, "prompt_logprobs": 1, "return_token_ids": True},
]
_CHATS: list[dict[str, Any]] = [
    {"temperature": 0.0},
    {"temperature": 0.9, "logprobs": True, "top_logprobs": 3},
    {"temperature": 0.8, "n": 2},
    {"temperature": 0.9, "response_format": _FORMAT},
    {"temperature": 0.9, "stop": ["return", "def "]},
    {"temperature": 0.8, "structured_outputs": {"choice": ["one of them", "another of them"]}},
]
_FREE = ("response_format", "structured_outputs", "stop")
_VOLATILE = {"id", "created", "prompt_tokens_details", "system_fingerprint"}
"""Fields that tell of the run."""


class AnswerError(Exception):
    """A request that was not answered as it must be, in one sentence."""


class UnloadedError(Exception):
    """The model was not there."""


@dataclass(frozen=True)
class Asked:
    """One request."""

    path: str
    body: dict[str, Any]


def make_requests(seed: int) -> list[Asked]:
    """Completions and chats, streamed and not, in all ways to choose tokens."""
    chance = random.Random(seed)
    text = HELDOUT.read_text()
    return [_request(chance, number, text) for number in range(NUM_REQUESTS)]


def _request(chance: random.Random, number: int, text: str) -> Asked:
    begin = chance.randrange(len(text) - 2000)
    # Most share a beginning with others; each fourth prompt takes steps to compute.
    prompt = text[begin : begin + (900 if number % 4 == 3 else chance.randrange(20, 120))]
    ways = _CHATS if number % 2 else _TEXTS
    body: dict[str, Any] = {
        "model": MODEL,
        "max_tokens": chance.randrange(60, 160),
        "seed": chance.getrandbits(32),
        "stream": number % 5 != 4,
        **ways[number // 2 % len(ways)],
    }
    if not body.keys() & {*_FREE}:
        body["ignore_eos"] = True
    if body["stream"]:
        body["stream_options"] = {"include_usage": True}
    if number % 2:
        said = [{"role": "user", "content": prompt}]
        return Asked("/v1/chat/completions", {**body, "messages": said})
    return Asked("/v1/completions", {**body, "prompt": prompt})


async def ask(
    url: str, asked: Asked, on_token: Callable[[], None] = lambda: None
) -> dict[str, list[Any]]:
    """What was answered, without what tells of the run: by choice, and the usage.

    Raises AnswerError for any other end than a whole answer, and UnloadedError.
    """
    try:
        async with (
            httpx2.AsyncClient(timeout=SECONDS, trust_env=False) as client,
            client.stream("POST", f"{url}{asked.path}", json=asked.body) as response,
        ):
            if response.status_code != 200:
                said = (await response.aread()).decode(errors="replace")
                if response.status_code == 404 and "model_not_found" in said:
                    raise UnloadedError
                raise AnswerError(f"{asked.path} was answered {response.status_code}: {said}")
            if not asked.body["stream"]:
                return by_choice([json.loads(await response.aread())])
            events = []
            async for line in response.aiter_lines():
                if line.startswith("data: "):
                    events.append(line.removeprefix("data: "))
                    on_token()
    except httpx2.HTTPError as error:
        raise AnswerError(f"{asked.path} broke: {type(error).__name__} {error}") from error
    if not events or events[-1] != "[DONE]":
        raise AnswerError(f"{asked.path} ended without [DONE] after {events[-1:]}")
    parts = [json.loads(event) for event in events[:-1]]
    for part in parts:
        if "error" in part:
            raise AnswerError(f"{asked.path} ended with {part['error']}")
    return by_choice(parts)


def by_choice(parts: list[dict[str, Any]]) -> dict[str, list[Any]]:
    """What lasts of an answer or its events, choice by choice: only those of one have an order."""
    found: dict[str, list[Any]] = {}
    for part in parts:
        for choice in part["choices"]:
            found.setdefault(f"choice {choice['index']}", []).append(_lasting(choice))
        if part.get("usage"):
            found["usage"] = [_lasting(part["usage"])]
    return found


def _lasting(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _lasting(one) for name, one in value.items() if name not in _VOLATILE}
    return [_lasting(one) for one in value] if isinstance(value, list) else value


def differences(expected: dict[str, list[Any]], found: dict[str, list[Any]]) -> Iterator[str]:
    """Where two answers part."""
    for name in sorted(expected.keys() | found.keys()):
        ours, theirs = expected.get(name, []), found.get(name, [])
        if ours == theirs:
            continue
        pairs = zip(ours, theirs, strict=False)
        at = next((at for at, (one, other) in enumerate(pairs) if one != other), None)
        if at is None:
            yield f"{name} has {len(theirs)} parts in the place of {len(ours)}"
        else:
            yield f"{name}, part {at}: {theirs[at]!r:.300} in the place of {ours[at]!r:.300}"
