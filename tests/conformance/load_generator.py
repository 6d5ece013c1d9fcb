"""aiperf, a load generator, end to end; what it counts and times is held against /metrics."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
from prometheus_client.parser import text_string_to_metric_families

from tests.conformance.cases import Case, Outcome, Report
from tests.conformance.outside import MODEL, Outside

VERSION = "0.13.0"
_PACKAGES = [f"aiperf=={VERSION}"]
_LEVELS = (1, 4, 16)
"""Requests at once; four times as many are asked, and no fewer than 16, of 128 tokens, for 64."""
_PROMPT_TOKENS = 128
_NEW_TOKENS = 64
_NEAR_SECONDS = 0.05
"""Between what a client and the server time: the way between, on a busy host."""
_NEAR = 0.25
"""The same as a share, whichever is more."""


@dataclass(frozen=True)
class Load:
    """What one side says of a run; times are means in seconds, of requests."""

    num_requests: int
    num_prompt_tokens: int
    num_new_tokens: int
    first_seconds: float
    token_seconds: float


def run(outside: Outside, _: Path | None) -> Report:
    """Raises SuiteError."""
    python = outside.python("load", _PACKAGES)
    cases: list[Case] = []
    lines = [
        "| at once | requests | output tokens/s | TTFT, ms: aiperf | /metrics "
        "| between tokens, ms: aiperf | /metrics |",
        "|---|---|---|---|---|---|---|",
    ]
    with outside.served() as server:
        # Loads the engine, which aiperf would take for the first request's time.
        body = {"prompt": "a", "max_tokens": 2}
        httpx2.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
        for level in _LEVELS:
            outside.say(f"aiperf, {level} at once")
            before = _scraped(server.url)
            folder = outside.folder / f"load-{level}"
            command = [python.with_name("aiperf"), "profile", "--model", MODEL, "--url", server.url]
            command += ["--endpoint-type", "completions", "--streaming", "--ui", "none"]
            command += ["--tokenizer", outside.packed, "--artifact-dir", folder]
            command += [
                "--concurrency",
                level,
                "--request-count",
                max(16, 4 * level),
                "--random-seed",
                1,
            ]
            command += ["--synthetic-input-tokens-mean", _PROMPT_TOKENS]
            command += ["--synthetic-input-tokens-stddev", 0]
            command += ["--output-tokens-mean", _NEW_TOKENS, "--output-tokens-stddev", 0]
            command += ["--extra-inputs", "ignore_eos:true", "--extra-inputs", "temperature:0"]
            outside.run(
                [str(part) for part in command],
                environment={"HF_HOME": str(outside.folder / "hub")},
                seconds=300,
            )
            found = json.loads((folder / "profile_export_aiperf.json").read_text())
            client, served = read_aiperf(found), read_metrics(before, _scraped(server.url))
            cases += compared(f"{level} at once", client, served)
            times = ((one.first_seconds, one.token_seconds) for one in (client, served))
            firsts, tokens = zip(*times, strict=True)
            figures = [f"{1000 * value:.1f}" for value in firsts]
            figures += [f"{1000 * value:.2f}" for value in tokens]
            speed = found["output_token_throughput"]["avg"]
            lines.append(
                f"| {level} | {client.num_requests} | {speed:.0f} | {' | '.join(figures)} |"
            )
    return Report("aiperf", VERSION, cases, ["\n".join(lines)])


def read_aiperf(found: dict[str, Any]) -> Load:
    """Of its JSON export. Tokens are those of the server's ``usage``."""
    return Load(
        int(found["completed_request_count"]["avg"]),
        int(found["total_usage_prompt_tokens"]["avg"]),
        int(found["total_usage_completion_tokens"]["avg"]),
        found["time_to_first_token"]["avg"] / 1000,
        found["inter_token_latency"]["avg"] / 1000,
    )


def read_metrics(before: str, after: str) -> Load:
    """What two scrapes have between them."""
    old, new = _samples(before), _samples(after)
    grown = {name: value - old.get(name, 0.0) for name, value in new.items()}

    def mean(name: str) -> float:
        return grown[f"vllm:{name}_sum"] / max(1.0, grown[f"vllm:{name}_count"])

    return Load(
        int(grown["vllm:request_success_total"]),
        int(grown["vllm:prompt_tokens_total"]),
        int(grown["vllm:generation_tokens_total"]),
        mean("time_to_first_token_seconds"),
        mean("time_per_output_token_seconds"),
    )


def compared(name: str, client: Load, server: Load) -> Iterator[Case]:
    """Counts are the same; times are near."""
    for what in ("num_requests", "num_prompt_tokens", "num_new_tokens"):
        said, counted = getattr(client, what), getattr(server, what)
        yield _case(f"{name}: {what}", said == counted, f"{said} by aiperf, {counted} by /metrics")
    for what in ("first_seconds", "token_seconds"):
        said, timed = getattr(client, what), getattr(server, what)
        near = abs(said - timed) <= max(_NEAR_SECONDS, _NEAR * timed)
        yield _case(f"{name}: {what}", near, f"{said:.4f} by aiperf, {timed:.4f} by /metrics")


def _case(name: str, good: bool, said: str) -> Case:
    return Case("aiperf", name, Outcome.PASSED if good else Outcome.FAILED, "" if good else said)


def _scraped(url: str) -> str:
    return httpx2.get(f"{url}/metrics", timeout=30).raise_for_status().text


def _samples(text: str) -> dict[str, float]:
    """Values by their names, whatever the labels."""
    values: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            values[sample.name] = values.get(sample.name, 0.0) + sample.value
    return values
