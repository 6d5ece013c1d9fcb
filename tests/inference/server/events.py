"""Reads streams of events as clients do."""

import json
from typing import Any

import httpx2


def stream(client: httpx2.Client, path: str, body: dict[str, Any]) -> list[dict[str, Any]]:
    """Those of an answer that is asked for now."""
    with client.stream("POST", path, json={**body, "stream": True}) as response:
        return events_of(response)


def events_of(response: httpx2.Response) -> list[dict[str, Any]]:
    """The events of an answer that is streamed, whose last is checked to be [DONE]."""
    response.read()
    assert response.status_code == 200, response.text
    assert response.headers["content-type"].startswith("text/event-stream")
    events = [line for line in response.text.splitlines() if line.startswith("data: ")]
    assert events[-1] == "data: [DONE]"
    return [json.loads(event.removeprefix("data: ")) for event in events[:-1]]


def text_of(events: list[dict[str, Any]], index: int = 0) -> str:
    """The text of one choice, of chats or completions."""
    return "".join(
        choice.get("text") or choice.get("delta", {}).get("content") or ""
        for one in events
        for choice in one["choices"]
        if choice["index"] == index
    )
