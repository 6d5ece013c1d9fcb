"""``python -m expertd_inference.process.embedded_child DIR ARGS``: ``expertd ARGS`` with a parent.

Its stdin is a pipe that the parent never writes to. When it closes, the parent is gone:
the daemon gets the SIGTERM that the parent can no longer send. DIR is then removed.
"""

import os
import shutil
import signal
import sys
import threading

from expertd.cli import main


def _stop_with_parent(directory: str) -> None:
    while os.read(0, 1):
        pass
    # Now, since a daemon that does not serve yet ends where it is.
    shutil.rmtree(directory, ignore_errors=True)
    os.kill(os.getpid(), signal.SIGTERM)


def run() -> None:
    """The daemon, until it ends or the parent does."""
    directory = sys.argv.pop(1)
    watch = threading.Thread(
        target=_stop_with_parent, args=(directory,), name="parent-watch", daemon=True
    )
    watch.start()
    try:
        main()
    finally:
        shutil.rmtree(directory, ignore_errors=True)


if __name__ == "__main__":
    run()
