"""Workers forked from a process that has done their imports."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from expertd_testing.daemon import serving
from tests.inference.greedy import greedy

Make = Callable[..., Any]

PROMPT = "def __repr__(self):"  # after which no token is about as likely as the next
SCRIPT = """
import json
import sys


def work(name, socket, prompt):
    before = list(sys.modules)
    from expertd_inference import GenerationSettings, Worker, generate
    from expertd_inference.process.attachment import attach

    with Worker(attach(name, socket)) as worker:
        result = generate(worker, prompt, GenerationSettings(max_new_tokens=8)).result
    print(json.dumps([before, result.tokens]), flush=True)


if __name__ == "__main__":
    from expertd_inference.process.fork_server import fork_context, start_imports

    start_imports()
    context = fork_context()
    for _ in range(2):
        process = context.Process(target=work, args=sys.argv[1:])
        process.start()
        process.join(100)
        assert process.exitcode == 0, process.exitcode
"""


def test_workers_of_a_fork_server(packed: Make, stock: Make, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    script = tmp_path / "workers.py"
    script.write_text(SCRIPT)
    with serving({"tiny": packed("example")}) as daemon:
        done = subprocess.run(
            [sys.executable, script, "tiny", daemon.socket, PROMPT],
            capture_output=True,
            text=True,
            timeout=120,
        )
    assert (done.returncode, done.stderr) == (0, "")
    prompt = AutoTokenizer.from_pretrained(packed("example"))(PROMPT).input_ids
    expected = greedy(stock("example"), prompt, 8)
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(lines) == 2
    for before, tokens in lines:
        assert {"torch", "transformers", "expertd_inference.worker"} <= set(before)
        assert tokens == expected
