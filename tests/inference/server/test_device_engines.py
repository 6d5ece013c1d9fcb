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
TOKENS = 100


@pytest.fixture(scope="module")
def served(packed: Make) -> Iterator[Server]:
    arguments = ["--embedded", packed("example", "4bit"), "--exact", "--kv-tokens", "2048"]
    for device in DEVICES:
        arguments += ["--device", device]
    with serving_http(*arguments, fake_devices=True) as started:
        yield started


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
def test_the_other_goes_on_and_it_is_started_again(served: Server, number: int) -> None:
    before = _engines(served)
    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(_num_tokens(served)))
    asking.start()
    running: list[dict[str, Any]] = []
    _until(lambda: running.extend(one for one in _engines(served) if one["running"]) or running)
    (ended,) = running
    os.kill(ended["pid"], number)
    asking.join()
    # No bit more is promised of devices than that it goes on, so the text may be another.
    assert found == [TOKENS]
    _until(lambda: all(engine["pid"] is not None for engine in _engines(served)))
    after = _engines(served)
    assert sum(engine["deaths"] for engine in after) == 1 + sum(one["deaths"] for one in before)
    assert ended["pid"] not in [engine["pid"] for engine in after]


def _engines(server: Server) -> list[dict[str, Any]]:
    (model,) = httpx2.get(server.url + "/host/state").json()["models"]
    found: list[dict[str, Any]] = model["engines"]
    return found


def _num_tokens(server: Server) -> int:
    """Of an answer, as its client gets them."""
    with httpx2.Client(base_url=server.url, timeout=120) as client:
        body = {
            "prompt": "def f(",
            "max_tokens": TOKENS,
            "ignore_eos": True,
            "stream_options": {"include_usage": True},
        }
        events = stream(client, "/v1/completions", body)
    assert not any("error" in event for event in events)
    num_tokens: int = events[-1]["usage"]["completion_tokens"]
    return num_tokens


def _until(true: Any) -> None:
    deadline = time.monotonic() + HANG_SECONDS
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)
