"""What a daemon's metrics say."""

import re
import urllib.request

from prometheus_client.parser import text_string_to_metric_families

from expertd_testing.daemon import Daemon

ANY = ("--metrics", "127.0.0.1:0")


def url(daemon: Daemon) -> str:
    found = re.search(r"metrics at (http://127\.0\.0\.1:\d+/metrics)\.$", daemon.stdout.strip())
    assert found, daemon.stdout
    return found[1]


def scrape(daemon: Daemon) -> str:
    with urllib.request.urlopen(url(daemon), timeout=10) as answer:
        text: str = answer.read().decode()
        return text


def values(text: str) -> dict[tuple[str, ...], float]:
    """By name and the labels' values."""
    return {
        (sample.name, *(sample.labels[label] for label in sorted(sample.labels))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }
