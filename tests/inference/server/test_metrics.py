"""What Prometheus reads of a server."""

from types import SimpleNamespace
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from expertd_inference.server.metrics import ServerMetrics, Times


def scraped(http: httpx2.Client) -> dict[str, float]:
    """Samples by their name, of the example model."""
    return samples(http.get("/metrics").text)


def samples(text: str) -> dict[str, float]:
    families = text_string_to_metric_families(text)
    return {
        sample.name
        + sample.labels.get("finished_reason", sample.labels.get("kind", "")): sample.value
        for family in families
        for sample in family.samples
        if sample.labels.get("model_name") == "example" and "le" not in sample.labels
    }


def test_a_request_is_counted_under_vllm_s_names(http: httpx2.Client) -> None:
    http.post("/v1/completions", json={"prompt": [1], "max_tokens": 1}).raise_for_status()
    before = scraped(http)
    asked = {"prompt": [40] * 130, "max_tokens": 5, "ignore_eos": True}
    for _ in range(2):
        http.post("/v1/completions", json=asked).raise_for_status()
    after = scraped(http)
    added = {name: after[name] - before.get(name, 0) for name in after}
    assert added["vllm:prompt_tokens_total"] == 260
    assert added["vllm:generation_tokens_total"] == 10
    assert added["vllm:request_success_totallength"] == 2
    assert added["vllm:time_to_first_token_seconds_count"] == 2
    assert added["vllm:inter_token_latency_seconds_count"] == 8
    assert added["vllm:request_queue_time_seconds_count"] == 2
    assert added["vllm:prefix_cache_hits_total"] == 128
    assert after["vllm:num_requests_running"] == after["vllm:num_requests_waiting"] == 0
    assert after["expertd:engine_up"] == 1
    assert 0 <= after["vllm:kv_cache_usage_perc"] <= 1
    assert after["expertd:steps_total"] > before["expertd:steps_total"]


def test_times_of_a_sequence() -> None:
    metrics, times = ServerMetrics(), Times(asked=10.0)
    metrics.began("example", 7)
    metrics.token("example", times, 13.0, queued=1.0)
    metrics.token("example", times, 14.0, queued=None)
    metrics.token("example", times, 17.0, queued=None)
    metrics.ended("example", times, 18.0, "stop")
    found = samples(metrics.text()[0].decode())
    assert found["vllm:prompt_tokens_total"] == found["vllm:request_prompt_tokens_sum"] == 7
    assert found["vllm:generation_tokens_total"] == found["vllm:request_generation_tokens_sum"] == 3
    assert found["vllm:request_success_totalstop"] == 1
    assert found["vllm:request_queue_time_seconds_sum"] == 1
    assert found["vllm:request_prefill_time_seconds_sum"] == 2
    assert found["vllm:time_to_first_token_seconds_sum"] == 3
    assert found["vllm:inter_token_latency_seconds_sum"] == 4
    assert found["vllm:request_decode_time_seconds_sum"] == 4
    assert found["vllm:time_per_output_token_seconds_sum"] == 2
    assert found["vllm:e2e_request_latency_seconds_sum"] == 8


def test_sequences_without_a_time_between_tokens() -> None:
    metrics = ServerMetrics()
    once = Times(asked=0.0)
    metrics.token("example", once, 2.0, queued=3.0)  # clocks of two processes
    metrics.ended("example", once, 2.0, "length")
    metrics.ended("example", Times(asked=0.0), 1.0, "abort")
    unknown = Times(asked=0.0)
    metrics.token("example", unknown, 1.0, queued=None)
    found = samples(metrics.text()[0].decode())
    assert found["vllm:request_prefill_time_seconds_sum"] == 0
    assert found["vllm:request_queue_time_seconds_count"] == 1
    assert "vllm:request_decode_time_seconds_count" not in found
    assert found["vllm:request_success_totalabort"] == 1


def test_failures_and_deaths() -> None:
    metrics = ServerMetrics()
    metrics.failed("example", "BusyError")
    metrics.engine_died("example", 0)
    found = samples(metrics.text()[0].decode())
    assert found["expertd:sequence_failures_totalBusyError"] == 1
    assert found["expertd:engine_deaths_total"] == 1


def test_the_first_death_and_the_first_end_are_increases() -> None:
    metrics = ServerMetrics()
    seats = [SimpleNamespace(number=number, total_stats=None) for number in range(2)]
    model: Any = SimpleNamespace(name="example", seats=seats)
    metrics.add(model)
    found = metrics.text()[0].decode()
    assert 'engine_deaths_total{engine="1",model_name="example"} 0.0' in found
    for reason in ("stop", "length", "abort"):
        labels = f'{{finished_reason="{reason}",model_name="example"}}'
        assert f"request_success_total{labels} 0.0" in found


@pytest.mark.parametrize("pid", [None, 7])
def test_what_an_engine_said_last(pid: int | None) -> None:
    names = {
        "num_running": "vllm:num_requests_running",
        "num_waiting": "vllm:num_requests_waiting",
        "kv_used": "vllm:kv_cache_usage_perc",
        "kv_tokens": "expertd:kv_tokens",
        "rows_mean": "expertd:rows_per_step",
        "experts_mean": "expertd:experts_per_row",
        "prefix_queries": "vllm:prefix_cache_queries_total",
        "prefix_hits": "vllm:prefix_cache_hits_total",
        "num_preemptions": "vllm:num_preemptions_total",
        "num_steps": "expertd:steps_total",
        "num_rows": "expertd:rows_total",
    }
    said = {name: number for number, name in enumerate(names, 1)}
    metrics = ServerMetrics()
    stats = SimpleNamespace(**said, executor="program")
    spec = SimpleNamespace(place="cpu")
    new = SimpleNamespace(number=0, spec=spec, is_up=False, total_stats=None)
    seat = SimpleNamespace(number=1, spec=spec, is_up=pid is not None, total_stats=stats)
    models: list[Any] = [
        SimpleNamespace(name="new", seats=[new]),
        SimpleNamespace(name="example", seats=[new, seat]),
    ]
    metrics.models += models
    found = samples(metrics.text()[0].decode())
    assert {name: found[sample] for name, sample in names.items()} == said
    assert found["expertd:engine_up"] == (pid is not None)
