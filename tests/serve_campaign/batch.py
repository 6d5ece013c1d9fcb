"""A batch whose server is killed while it computes it: nothing twice, nothing lost."""

import asyncio
import json
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx2

from tests.serve_campaign.asking import Asked, by_choice, differences

SECONDS = 120.0
PATH = "/v1/completions"


def lines_of(requests: Sequence[Asked]) -> list[tuple[int, Asked]]:
    """What of the requests a batch can have, by their numbers, each three times."""
    found = [(n, one) for n, one in enumerate(requests) if one.path == PATH]
    return [(n + 1000 * turn, one) for turn in range(3) for n, one in found]


async def begin_batch(url: str, requests: Sequence[Asked]) -> str:
    """Its identity."""
    lines = [
        {"custom_id": str(number), "method": "POST", "url": PATH, "body": _whole(asked)}
        for number, asked in lines_of(requests)
    ]
    content = "".join(f"{json.dumps(line)}\n" for line in lines).encode()
    async with httpx2.AsyncClient(base_url=url, timeout=SECONDS, trust_env=False) as client:
        files = {"file": ("in.jsonl", content)}
        file = await client.post("/v1/files", data={"purpose": "batch"}, files=files)
        body = {"input_file_id": file.json()["id"], "endpoint": PATH, "completion_window": "24h"}
        batch = await client.post("/v1/batches", json=body)
    identity: str = batch.json()["id"]
    return identity


async def expected_of_batch(url: str, requests: Sequence[Asked]) -> dict[str, Any]:
    """The same answers, asked for one by one."""
    async with httpx2.AsyncClient(base_url=url, timeout=SECONDS, trust_env=False) as client:

        async def one(asked: Asked) -> Any:
            return (await client.post(PATH, json=_whole(asked))).json()

        alone = [asked for asked in requests if asked.path == PATH]
        answers = await asyncio.gather(*map(one, alone))
    by_request = {id(asked): answer for asked, answer in zip(alone, answers, strict=True)}
    return {str(number): by_request[id(asked)] for number, asked in lines_of(requests)}


async def wrong_in_batch(url: str, identity: str, expected: dict[str, Any]) -> list[str]:
    """Waits for its end; what is not as it must be."""
    deadline = time.monotonic() + SECONDS
    async with httpx2.AsyncClient(base_url=url, timeout=SECONDS, trust_env=False) as client:
        while True:
            batch = (await client.get(f"/v1/batches/{identity}")).json()
            if batch.get("status") == "completed":
                break
            if time.monotonic() > deadline:
                return [f"a batch did not go on: {batch}"]
            await asyncio.sleep(0.2)
        text = (await client.get(f"/v1/files/{batch['output_file_id']}/content")).text
    return [*_wrong(expected, [json.loads(line) for line in text.splitlines()])]


def _wrong(expected: dict[str, Any], lines: Sequence[dict[str, Any]]) -> Iterator[str]:
    found = {line["custom_id"]: line["response"]["body"] for line in lines}
    if len(found) < len(lines):
        yield f"a batch has {len(lines)} answers to {len(found)} requests"
    if missing := expected.keys() - found.keys():
        yield f"a batch has no answer to {sorted(missing)}"
    for name in expected.keys() & found.keys():
        for where in differences(by_choice([expected[name]]), by_choice([found[name]])):
            yield f"request {name} of a batch: {where}"


def _whole(asked: Asked) -> dict[str, Any]:
    """A batch's answers come whole."""
    left_out = ("stream", "stream_options")
    return {name: value for name, value in asked.body.items() if name not in left_out}
