"""The whole path in a minute: pack the example model, serve it, generate with two workers.

The daemon gets RAM for half of the experts only, so the rest is read from disk when it is
needed. Both workers compute from the same copy. Run it with ``make demo``.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console, Group
from rich.live import Live
from rich.markup import escape
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from expertstore.command_line import command

CHECKPOINT = Path(__file__).parent / "tiny-mixtral"
PROMPTS = (
    'def read_lines(path):\n    """Return the lines of the file',
    "import unittest\n\nclass QueueTest(unittest.TestCase):",
)
MODEL = "tiny-mixtral"
NEW_TOKENS = int(os.environ.get("DEMO_TOKENS", "160"))
SCHEME = os.environ.get("DEMO_SCHEME", "4bit")
BIN = Path(sys.executable).parent
STOP_SECONDS = 20

console = Console(highlight=False)
if not console.is_terminal:
    console.width = 110  # a log has no edge; the table shall not wrap


def main() -> None:
    """Runs the demo; the exit code of a part that fails becomes its own."""
    with tempfile.TemporaryDirectory(prefix="expertd-demo-") as scratch:
        pack = Path(scratch) / "pack"
        step(f"Pack: experts as {SCHEME}, one record each")
        run("expertd", "pack", str(CHECKPOINT), str(pack), "--scheme", SCHEME)
        facts = json.loads(run("expertd", "inspect", str(pack), "--json", capture=True))
        ram = facts["expert_bytes"] // 2
        step(f"Serve: RAM for half of the {facts['num_experts']} experts, the rest on disk")
        with daemon(Path(scratch) / "run", pack, ram) as socket:
            step("Generate: two workers at once, from one copy")
            results = generate(socket)
            stats = json.loads(
                run("expertd", "stats", "--socket", str(socket), "--json", capture=True)
            )
            show(stats, results)


def step(title: str) -> None:
    """Announces a part of the demo."""
    console.print(f"\n[bold cyan]{title}[/]")


def run(program: str, *arguments: str, capture: bool = False) -> str:
    """Runs one of the project's commands, which reports its own errors."""
    if not capture:
        console.print(f"[dim]$ {escape(command(program, *arguments))}[/]", soft_wrap=True)
    done = subprocess.run(
        [BIN / program, *arguments], stdout=subprocess.PIPE if capture else None, text=True
    )
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout or ""


@contextmanager
def daemon(socket: Path, pack: Path, ram: int) -> Iterator[Path]:
    """A daemon on a socket of its own, stopped by SIGTERM at the end."""
    words = ["expertd", "serve", "--socket", str(socket), "--ram", str(ram)]
    words += ["--model", f"{MODEL}={pack}"]
    console.print(f"[dim]$ {escape(command(*words))}[/]", soft_wrap=True)
    log = socket.with_suffix(".log")
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [BIN / words[0], *words[1:]], stdout=subprocess.PIPE, stderr=stderr, text=True
        )
    assert process.stdout is not None
    try:
        greeting = process.stdout.readline()
        if not greeting:
            sys.stderr.write(log.read_text())
            sys.exit(process.wait())
        console.print(greeting.strip(), soft_wrap=True)
        yield socket
    finally:
        process.send_signal(signal.SIGTERM)
        code = process.wait(STOP_SECONDS)
        console.print(f"\n[dim]expertd stopped with exit code {code}[/]")


class Worker:
    """One ``expert-run generate`` process, and the text that it has streamed so far."""

    def __init__(self, number: int, socket: Path, prompt: str, threads: int) -> None:
        self.title = f"worker {number}"
        self.prompt = prompt
        self.text = ""
        self._process = subprocess.Popen(
            [BIN / "expert-run", "generate", "--socket", str(socket), "--model", MODEL,
             "--prompt", prompt, "--max-new-tokens", str(NEW_TOKENS), "--threads", str(threads),
             "--temperature", "0.8", "--top-p", "0.9", "--seed", str(number), "--json", "--stream"],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    @property
    def is_running(self) -> bool:
        """Whether there is text to come."""
        return self._reader.is_alive()

    def result(self) -> dict[str, Any]:
        """Its JSON object, when it is done."""
        assert self._process.stdout is not None
        with self._process.stdout as stdout:
            output = stdout.read()
        self._reader.join()
        if self._process.wait():
            sys.exit(f"{self.title} failed:\n{self.text}")
        result: dict[str, Any] = json.loads(output)
        return result

    def _read(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as stream:
            while piece := os.read(stream.fileno(), 4096):
                self.text += piece.decode(errors="replace")


def generate(socket: Path) -> list[dict[str, Any]]:
    """Both workers' results; their texts are shown while they come."""
    threads = max(1, (os.cpu_count() or 1) // len(PROMPTS))
    workers = [
        Worker(number, socket, prompt, threads) for number, prompt in enumerate(PROMPTS, start=1)
    ]
    if console.is_terminal:
        with Live(console=console, refresh_per_second=12, get_renderable=lambda: panels(workers)):
            wait(workers)
    else:
        wait(workers)
        console.print(panels(workers))
    return [worker.result() for worker in workers]


def wait(workers: list[Worker]) -> None:
    """Until all have written their text; without a terminal, lines are printed as they end."""
    shown = dict.fromkeys(workers, 0)
    while True:
        running = any(worker.is_running for worker in workers)
        for worker in workers:
            *lines, _ = worker.text[shown[worker] :].split("\n")
            if not console.is_terminal:
                for line in lines:
                    print(f"{worker.title} | {line}", flush=True)
            shown[worker] += sum(len(line) + 1 for line in lines)
        if not running:
            return
        threading.Event().wait(0.05)


def panels(workers: list[Worker]) -> Columns:
    """The texts side by side, prompts dimmed."""
    width = max(30, console.width // len(workers) - 1)
    return Columns(
        [
            Panel(
                Group(Text.assemble((worker.prompt, "dim"), worker.text)),
                title=worker.title,
                width=width,
                height=28 if console.is_terminal else None,
            )
            for worker in workers
        ]
    )


def show(stats: dict[str, Any], results: list[dict[str, Any]]) -> None:
    """The table at the end."""
    arena, model = stats["arena"], stats["models"][0]
    table = Table(title="One copy, two workers", title_justify="left")
    for column in ("", "RAM", "hits", "NVMe reads", "evicted", "tokens", "tokens/s"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for number, result in enumerate(results, start=1):
        table.add_row(
            f"worker {number}",
            f"{mebibytes(result['peak_pss_bytes'])} PSS",
            str(result["host_hits"]),
            str(result["nvme_misses"]),
            "",
            str(result["new_tokens"]),
            f"{result['tokens_per_second']:.1f}",
        )
    table.add_section()
    table.add_row(
        "shared copy",
        f"{mebibytes(arena['bytes_used'])} of {mebibytes(arena['bytes_total'])}",
        str(model["host_hits"]),
        f"{model['nvme_misses']} ({mebibytes(model['nvme_bytes_read'])})",
        str(model["evictions"]),
        str(sum(result["new_tokens"] for result in results)),
        f"{sum(result['tokens_per_second'] for result in results):.1f}",
    )
    console.print(table)
    resident = f"{model['num_resident']} of {model['num_experts']}"
    console.print(
        f"{resident} experts in RAM at the end; "
        f"{mebibytes(arena['locked'])} of the arena locked. A worker's PSS is mostly Python and "
        "torch; its share of the experts is the shared copy's."
    )


def mebibytes(num_bytes: int) -> str:
    """A size in MiB."""
    return f"{num_bytes / (1 << 20):.1f} MiB"


if __name__ == "__main__":
    main()
