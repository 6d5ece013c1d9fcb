"""The process that engines on the CPU are forked from, which has imported torch already."""

import multiprocessing
import os
import signal
from multiprocessing import forkserver
from multiprocessing.context import ForkServerContext

_IMPORTS = "expertd_inference.process.preload"


def fork_context() -> ForkServerContext:
    """Starts processes; the first one waits until the imports are done."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([_IMPORTS])
    return context


def start_imports() -> None:
    """Begins them, beside what this process does until it starts an engine."""
    fork_context()
    # Ctrl-C is for this process alone; the other one would tell of it in the midst of an import.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_imports() -> None:
    """Ends that process, also in the midst of them; for a command that is about to end.

    Else it ended by itself only after them, and whoever reads this process's stderr to its end
    would wait for that.
    """
    pid = getattr(forkserver._forkserver, "_forkserver_pid", None)
    if pid is not None:
        os.kill(pid, signal.SIGTERM)
