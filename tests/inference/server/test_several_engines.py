"""Two engines of one model, each on its core: one text, whichever computes it."""

import os
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from expertd_testing.patience import HANG_SECONDS
from expertd_testing.server import Server, serving_http
from tests.inference.conftest import Make
from tests.inference.server.events import stream, text_of

CLIENTS = 6
pytestmark = pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="each engine needs a core")


@pytest.fixture(scope="module")
def pair(packed: Make) -> Iterator[Server]:
    """Two engines that together have as many places as there are clients."""
    arguments = ["--embedded", packed("example", "4bit"), "--exact", "--engines", "2"]
    arguments += ["--threads", "1", "--max-sequences", "3", "--kv-tokens", "16384"]
    with serving_http(*arguments) as started:
        yield started


def test_both_compute_and_texts_are_those_of_one_engine(pair: Server, server: Server) -> None:
    line = "executor program on cpu {}, room for 16384 tokens"
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) == 2:
        assert "; ".join(line.format(core) for core in cores) in pair.greeting
    before = _metric(pair, "expertd:steps_total")
    assert _all(pair) == _all(server)
    after = _metric(pair, "expertd:steps_total")
    assert all(after[engine] > before[engine] for engine in ("0", "1"))
    assert len(set(map(_affinity, pair.engines))) == 2


def test_a_killed_engine_s_sequences_go_on_in_the_other(pair: Server) -> None:
    expected = _all(pair)
    with ThreadPoolExecutor(1) as pool:
        found = pool.submit(_all, pair)
        time.sleep(0.3)
        os.kill(pair.engines[0], signal.SIGKILL)
        assert found.result() == expected
    assert sum(_metric(pair, "expertd:engine_deaths_total").values()) == 1
    deadline = time.monotonic() + HANG_SECONDS
    while sum(_metric(pair, "expertd:engine_up").values()) < 2:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    assert _all(pair) == expected


def test_a_prefix_is_found_again_where_it_was_computed(pair: Server) -> None:
    with httpx2.Client(base_url=pair.url, timeout=60) as http:
        before = _metric(pair, "vllm:prefix_cache_hits_total")
        for _ in range(4):
            body = {"prompt": [50] * 130, "max_tokens": 1}
            http.post("/v1/completions", json=body).raise_for_status()
        after = _metric(pair, "vllm:prefix_cache_hits_total")
        assert sorted(after[engine] - before[engine] for engine in after) == [0, 3 * 128]


def test_the_host_s_state_has_each_engine(pair: Server) -> None:
    with httpx2.Client(base_url=pair.url, timeout=60) as http:
        (model,) = http.get("/host/state").json()["models"]
    assert sorted(engine["pid"] for engine in model["engines"]) == sorted(pair.engines)
    assert {engine["kv_tokens"] for engine in model["engines"]} == {16384}
    assert len({engine["place"] for engine in model["engines"]}) == 2


def _all(server: Server) -> list[str]:
    with ThreadPoolExecutor(CLIENTS) as pool:
        return [*pool.map(lambda number: _text(server, number), range(CLIENTS))]


def _text(server: Server, number: int) -> str:
    with httpx2.Client(base_url=server.url, timeout=120) as client:
        body = {
            "prompt": f"def function_{number}(",
            "max_tokens": 300,
            "temperature": 0.8,
            "seed": number,
            "ignore_eos": True,
        }
        events = stream(client, "/v1/completions", body)
    assert not any("error" in event for event in events)
    return text_of(events)


def _metric(server: Server, name: str) -> dict[str, float]:
    """Of each engine."""
    text = httpx2.get(server.url + "/metrics").text
    return {
        sample.labels["engine"]: sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
        if sample.name == name
    }


def _affinity(pid: int) -> tuple[int, ...]:
    return tuple(sorted(os.sched_getaffinity(pid)))
