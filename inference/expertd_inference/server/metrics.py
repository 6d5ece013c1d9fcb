"""``/metrics``: what the server does, under vLLM's names where the meaning is the same."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST, generate_latest
from prometheus_client.registry import Collector

from expertd_inference.engine.stops import FinishReason

if TYPE_CHECKING:
    from expertd_inference.server.hosting.hosted_model import HostedModel

ABORTED = "abort"
"""The reason of a sequence that was cancelled, as vLLM has it."""
_LABELS = ("model_name",)
_SECONDS = (
    *(0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0),
    *(7.5, 10.0, 20.0, 40.0, 80.0, 160.0, 640.0, 2560.0),
)
_STEP_SECONDS = (
    *(0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0),
    *(10.0, 40.0),
)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)
_CONTENT_TYPE = CONTENT_TYPE_LATEST


@dataclass
class Times:
    """When what happened to a sequence, in seconds of one clock."""

    asked: float
    first: float | None = None
    last: float | None = None
    num_tokens: int = 0
    queued_seconds: float | None = None


class ServerMetrics(Collector):
    """Counts of all models of one server; ``models`` are asked when somebody scrapes."""

    def __init__(self) -> None:
        self.models: list[HostedModel] = []
        self.registry = registry = CollectorRegistry()

        def histogram(name: str, what: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}", what, _LABELS, buckets=buckets, registry=registry)

        def counter(name: str, what: str, *labels: str) -> Counter:
            return Counter(f"vllm:{name}", what, (*_LABELS, *labels), registry=registry)

        self._prompt_tokens = counter("prompt_tokens", "Tokens of prompts.")
        self._new_tokens = counter("generation_tokens", "Tokens generated.")
        self._success = counter("request_success", "Sequences that ended.", "finished_reason")
        self._failed = Counter(
            "expertd:sequence_failures",
            "Sequences that ended with an error.",
            (*_LABELS, "kind"),
            registry=registry,
        )
        self._deaths = Counter(
            "expertd:engine_deaths",
            "Engines that ended before they were told to.",
            (*_LABELS, "engine"),
            registry=registry,
        )
        self._prompt_size = histogram("request_prompt_tokens", "Of a prompt.", _TOKENS)
        self._new_size = histogram("request_generation_tokens", "Of an answer.", _TOKENS)
        self._first = histogram("time_to_first_token_seconds", "From asking on.", _SECONDS)
        self._between = histogram("inter_token_latency_seconds", "Between tokens.", _STEP_SECONDS)
        self._mean = histogram(
            "time_per_output_token_seconds", "Of a sequence, in the mean.", _STEP_SECONDS
        )
        self._whole = histogram("e2e_request_latency_seconds", "From asking to the end.", _SECONDS)
        self._queue = histogram("request_queue_time_seconds", "Waiting for a place.", _SECONDS)
        self._prefill = histogram(
            "request_prefill_time_seconds", "From a place to the first token.", _SECONDS
        )
        self._decode = histogram(
            "request_decode_time_seconds", "From the first token to the last.", _SECONDS
        )
        registry.register(self)

    def add(self, model: "HostedModel") -> None:
        """A model is served from now on.

        Its ends are counted from 0: Prometheus sees no increase in the first value of a series.
        """
        self.models.append(model)
        for seat in model.seats:
            self._deaths.labels(model.name, seat.number)
        for reason in (*FinishReason, ABORTED):
            self._success.labels(model.name, reason)

    def text(self) -> tuple[bytes, str]:
        """All of it as Prometheus reads it, and the content's type."""
        return generate_latest(self.registry), _CONTENT_TYPE

    def began(self, model: str, num_prompt_tokens: int) -> None:
        """A sequence was asked for."""
        self._prompt_tokens.labels(model).inc(num_prompt_tokens)
        self._prompt_size.labels(model).observe(num_prompt_tokens)

    def saw(self, model: str, num_tokens: int) -> None:
        """The images of a prompt have so many tokens more than were known."""
        self._prompt_tokens.labels(model).inc(num_tokens)

    def token(self, model: str, times: Times, now: float, queued: float | None) -> None:
        """A token came; ``queued`` says of the first how long the sequence waited for a place."""
        self._new_tokens.labels(model).inc()
        times.num_tokens += 1
        if times.first is None or times.last is None:
            times.first = times.last = now
            self._first.labels(model).observe(now - times.asked)
            if queued is not None:
                times.queued_seconds = queued
                self._queue.labels(model).observe(queued)
                self._prefill.labels(model).observe(max(0.0, now - times.asked - queued))
            return
        self._between.labels(model).observe(now - times.last)
        times.last = now

    def ended(self, model: str, times: Times, now: float, reason: str) -> None:
        """A sequence is complete, or was cancelled."""
        self._success.labels(model, reason).inc()
        self._new_size.labels(model).observe(times.num_tokens)
        self._whole.labels(model).observe(now - times.asked)
        if times.first is not None and times.last is not None and times.num_tokens > 1:
            decoding = times.last - times.first
            self._decode.labels(model).observe(decoding)
            self._mean.labels(model).observe(decoding / (times.num_tokens - 1))

    def failed(self, model: str, kind: str) -> None:
        """A sequence ended with an error of this kind."""
        self._failed.labels(model, kind).inc()

    def engine_died(self, model: str, engine: int) -> None:
        """An engine ended before it was told to."""
        self._deaths.labels(model, engine).inc()

    def collect(self) -> Iterable[Metric]:
        """Of prometheus_client: what engines said last."""
        gauges = {
            "vllm:num_requests_running": "Sequences that are computed.",
            "vllm:num_requests_waiting": "Sequences that wait for a place.",
            "vllm:kv_cache_usage_perc": "Share of the KV blocks in use, 0 to 1.",
            "expertd:kv_tokens": "Tokens that the keys and values have room for.",
            "expertd:rows_per_step": "Rows of a step, in the mean since the engine's start.",
            "expertd:experts_per_row": "Experts that computed a row of a layer, in that mean.",
        }
        counters = {
            "vllm:prefix_cache_queries": "Tokens looked up among earlier sequences'.",
            "vllm:prefix_cache_hits": "Tokens found there.",
            "vllm:num_preemptions": "Sequences that gave up their place and took it again.",
            "expertd:steps": "Steps computed.",
            "expertd:rows": "Rows computed.",
        }
        families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}
        labels = (*_LABELS, "engine")
        for name, what in gauges.items():
            families[name] = GaugeMetricFamily(name, what, labels=labels)
        for name, what in counters.items():
            families[name] = CounterMetricFamily(name, what, labels=labels)
        up = families["expertd:engine_up"] = GaugeMetricFamily(
            "expertd:engine_up",
            "Whether the engine runs, and by which executor it computes on which device.",
            labels=(*labels, "device", "executor"),
        )
        seats = [(model.name, seat) for model in self.models for seat in model.seats]
        for name, seat in seats:
            stats = seat.total_stats
            if stats is None:
                continue
            engine = (name, str(seat.number))
            up.add_metric((*engine, seat.spec.place, stats.executor), float(seat.is_up))
            values = {
                "vllm:num_requests_running": stats.num_running,
                "vllm:num_requests_waiting": stats.num_waiting,
                "vllm:kv_cache_usage_perc": stats.kv_used,
                "expertd:kv_tokens": stats.kv_tokens,
                "expertd:rows_per_step": stats.rows_mean,
                "expertd:experts_per_row": stats.experts_mean,
                "vllm:prefix_cache_queries": stats.prefix_queries,
                "vllm:prefix_cache_hits": stats.prefix_hits,
                "vllm:num_preemptions": stats.num_preemptions,
                "expertd:steps": stats.num_steps,
                "expertd:rows": stats.num_rows,
            }
            for family, value in values.items():
                families[family].add_metric(engine, value)
        return families.values()
