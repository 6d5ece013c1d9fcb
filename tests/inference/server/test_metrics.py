"""What Prometheus reads of a server."""

import httpx2
from prometheus_client.parser import text_string_to_metric_families


def scraped(http: httpx2.Client) -> dict[str, float]:
    """Samples by their name, of the example model."""
    families = text_string_to_metric_families(http.get("/metrics").text)
    return {
        sample.name + sample.labels.get("finished_reason", ""): sample.value
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
