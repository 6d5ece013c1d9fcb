"""A model in a fork of its process refuses at once, whatever is asked of it."""

import subprocess
import sys
from collections.abc import Callable
from typing import Any

from expertd_testing.daemon import serving
from expertd_testing.patience import HANG_SECONDS

Make = Callable[..., Any]

SCRIPT = """
import os, signal, sys
from expertd_inference.process.environment import prepare_environment
prepare_environment(device="cpu")
import torch
from expertd_inference import Worker, generate
from expertd_inference.process.attachment import attach

torch.set_num_threads(2)
worker = Worker(attach("m", sys.argv[1]))
model, ids = worker.model, torch.randint(0, 256, (1, 30))
# Threads of parallel operations, which no child has.
torch.randn(2000, 2000) @ torch.randn(2000, 2000)
expected = generate(worker, "abc").result.tokens

calls = [
    lambda: model.generate(ids, max_new_tokens=4, do_sample=False),
    lambda: model(ids),
    lambda: model.model(ids),
    lambda: model.model.layers[0].mlp(torch.randn(1, 64, 128)),
    lambda: generate(worker, "abc" * 50),
]
for number, call in enumerate(calls):
    child = os.fork()
    if child == 0:
        signal.alarm(int(sys.argv[2]))  # One that hangs is ended, and missed below.
        try:
            call()
        except Exception as error:
            print(number, type(error).__name__, error, flush=True)
        finally:
            os._exit(0)
    if os.waitpid(child, 0)[1]:
        break
# And the parent goes on as if nothing had been.
print(generate(worker, "abc").result.tokens == expected)
worker.close()
"""


def test_forks_are_refused(packed: Make) -> None:
    with serving({"m": packed("mixtral", "4bit")}) as daemon:
        done = subprocess.run(
            [sys.executable, "-c", SCRIPT, daemon.socket, str(int(HANG_SECONDS))],
            capture_output=True,
            text=True,
            timeout=120,
            env={"PYTHONWARNINGS": "ignore"},
        )
    *children, parent = done.stdout.splitlines()
    assert len(children) == 5, done.stderr
    for number, line in enumerate(children):
        assert line.startswith(f"{number} PreconditionError This model was loaded by process ")
        assert "spawn" in line
    assert parent == "True"
