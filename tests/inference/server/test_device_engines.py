"""Engines on devices, which here are fake: one for each, in processes that are spawned."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest

from expertd_testing.patience import HANG_SECONDS
from expertd_testing.server import Server, serving_http
from tests.inference.conftest import Make
from tests.inference.server.events import stream

DEVICES = ("fake:0", "fake:1")
BODY = {
    "prompt": "def f(",
    "max_tokens": 100,
    "temperature": 0,
    "ignore_eos": True,
    "logprobs": 2,
}


@pytest.fixture(scope="module")
def served(packed: Make) -> Iterator[Server]:
    arguments = ["--embedded", packed("example", "4bit"), "--exact", "--kv-tokens", "2048"]
    for device in DEVICES:
        arguments += ["--device", device]
    with serving_http(*arguments, fake_devices=True) as started:
        yield started


@pytest.fixture(scope="module")
def expected(served: Server) -> list[Any]:
    """The answer that nothing happens to."""
    return _answer(served)


def test_each_device_has_an_engine(served: Server) -> None:
    for device in DEVICES:
        assert f"on {device}, room for 2048 tokens" in served.greeting
    engines = _engines(served)
    assert [engine["place"] for engine in engines] == [*DEVICES]
    metrics = httpx2.get(served.url + "/metrics").text
    for number, engine in enumerate(engines):
        line = f'engine="{number}",executor="{engine["executor"]}",model_name="example"}} 1.0'
        assert f'expertd:engine_up{{device="fake:{number}",{line}' in metrics


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGUSR1], ids=["killed", "GPU lost"])
def test_the_other_goes_on_and_it_is_started_again(
    served: Server, expected: list[Any], number: int
) -> None:
    before = _engines(served)
    found: list[list[Any]] = []
    asking = threading.Thread(target=lambda: found.append(_answer(served)))
    asking.start()
    _until(lambda: any(engine["running"] for engine in _engines(served)))
    (ended,) = [engine for engine in _engines(served) if engine["running"]]
    os.kill(ended["pid"], number)
    asking.join()
    assert found == [expected]
    _until(lambda: all(engine["pid"] is not None for engine in _engines(served)))
    after = _engines(served)
    assert sum(engine["deaths"] for engine in after) == 1 + sum(one["deaths"] for one in before)
    assert ended["pid"] not in [engine["pid"] for engine in after]


def _engines(server: Server) -> list[dict[str, Any]]:
    (model,) = httpx2.get(server.url + "/host/state").json()["models"]
    found: list[dict[str, Any]] = model["engines"]
    return found


def _answer(server: Server) -> list[Any]:
    """Tokens, how likely each was, and which others were likely."""
    with httpx2.Client(base_url=server.url, timeout=120) as client:
        events = stream(client, "/v1/completions", BODY)
    assert not any("error" in event for event in events)
    found = [one["logprobs"] for event in events for one in event["choices"] if one["logprobs"]]
    names = ("tokens", "token_logprobs", "top_logprobs")
    answer = [[each for one in found for each in one[name]] for name in names]
    assert {*map(len, answer)} == {BODY["max_tokens"]}
    return answer


def _until(true: Any) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
