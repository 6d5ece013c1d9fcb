"""What an honest client's stream costs while another process does its worst to the server.

``python -m bench.hostile_http`` prints a line for each attack, ``--json`` one object; name some to
have only those. Before and during are measured in the same seconds on one machine, whose cores the
attacker also takes: the ratio is what to read.
"""

import argparse
import ast
import asyncio
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from bench.load_client import LoadClient, percentile
from bench.progress import progress
from expertd_testing.http_attacks import ATTACKS
from expertd_testing.server import Server, serving_http
from expertd_testing.watching import num_files, rss_bytes

EXAMPLE = Path(__file__).parents[1] / "examples/tiny-mixtral"
VOCABULARY = 4096
STREAM_TOKENS = 100
BEFORE_SECONDS, SECONDS = 4.0, 8.0


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("attacks", nargs="*", choices=[[], *ATTACKS], metavar="ATTACK")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    arguments = parser.parse_args()
    console = Console(stderr=True)
    results = {}
    with tempfile.TemporaryDirectory(prefix="expertd-bench-") as directory:
        pack = Path(directory) / "pack"
        command = [sys.executable, "-m", "expertd", "pack", EXAMPLE, pack, "--scheme", "4bit"]
        subprocess.run(command, check=True, capture_output=True)
        with (
            progress(console, "Starting a server") as status,
            serving_http("--embedded", pack, "--threads", "1") as server,
        ):
            client = LoadClient(server.url, VOCABULARY)
            between(client, BEFORE_SECONDS)  # warm
            for name in arguments.attacks or ATTACKS:
                status.update(name)
                results[name] = under(name, server, client)
            if server.returncode is not None or "Traceback" in server.log:
                sys.exit(f"The server is not well:\n{server.log[-4000:]}")
    if arguments.json:
        print(json.dumps(results, indent=1))
    else:
        show(results)


def under(name: str, server: Server, client: LoadClient) -> dict[str, Any]:
    """One attack: seconds between an honest client's tokens before and during it."""
    rss, files = rss_bytes(server.pid), num_files(server.pid)
    before = between(client, BEFORE_SECONDS)
    said: dict[str, int] = {}
    with attacked(name, server, said):
        during = between(client, SECONDS)
        growth, more = rss_bytes(server.pid) - rss, num_files(server.pid) - files
    deadline = time.monotonic() + 20
    while num_files(server.pid) > files and time.monotonic() < deadline:
        time.sleep(0.1)
    figures: dict[str, Any] = {
        f"{when}_p{percent}_ms": round(percentile(times, percent) * 1e3, 2)
        for when, times in (("before", before), ("during", during))
        for percent in (50, 95, 99)
    }
    left = num_files(server.pid) - files
    return {**figures, "rss_growth_bytes": growth, "files": more, "files_left": left, "told": said}


def between(client: LoadClient, seconds: float) -> list[float]:
    """Seconds between the tokens of one stream after the other, for so long."""
    found: list[float] = []
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        found += asyncio.run(client.ask(client.prompt(8), STREAM_TOKENS)).between
    return found


@contextmanager
def attacked(name: str, server: Server, said: dict[str, int]) -> Iterator[None]:
    """While the block runs, that attack goes on; ``said`` is filled with what came of it."""
    parts = urlsplit(server.url)
    command = [sys.executable, "-m", "expertd_testing.http_attacks", name]
    with subprocess.Popen(
        [*command, str(parts.hostname), str(parts.port)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None
            first = process.stdout.readline()
            assert first == "attacking\n", first
            yield
            out, _ = process.communicate("", timeout=60)
            said.update(ast.literal_eval(out))
        finally:
            process.kill()


def show(results: dict[str, dict[str, Any]]) -> None:
    """A table."""
    table = Table(title="Between two tokens of an honest client, ms")
    columns = (
        "attack",
        "p50",
        "during",
        "p95",
        "during",
        "p99",
        "during",
        "RSS",
        "files",
        "answers",
    )
    for column in columns:
        table.add_column(column, justify="left" if column == "attack" else "right")
    for name, row in results.items():
        cells = [
            f"{row[f'{when}_p{percent}_ms']:.1f}"
            for percent in (50, 95, 99)
            for when in ("before", "during")
        ]
        table.add_row(
            name,
            *cells,
            f"{row['rss_growth_bytes'] / 2**20:+.0f} MiB",
            f"{row['files']:+d}, {row['files_left']} left",
            ", ".join(f"{count} {what}" for what, count in row["told"].items()),
        )
    Console(width=max(140, Console().width)).print(table)


if __name__ == "__main__":
    main()
