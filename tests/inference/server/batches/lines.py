"""Files of requests, and of answers, as tests write and read them."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any


def request(custom_id: str, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    """One line: two tokens, unless told otherwise."""
    body = {"prompt": [1, 2], "max_tokens": 2, "ignore_eos": True, **body}
    return {"custom_id": custom_id, "method": "POST", "url": url, "body": body}


def write_lines(path: Path, lines: Iterable[dict[str, Any] | str]) -> Path:
    """As JSON, but for those that are texts."""
    texts = (line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def answers_of(text: str) -> dict[str, dict[str, Any]]:
    """The lines of a file of answers, by custom_id; each may be there once."""
    lines = [json.loads(line) for line in text.splitlines()]
    found = {line["custom_id"]: line for line in lines}
    assert len(found) == len(lines)
    return found
