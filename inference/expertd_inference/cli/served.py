"""A server of one's own: ``expert-run serve`` in a child process, gone with this one."""

import ctypes
import re
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack

from expertstore.closing import Closing
from expertstore.errors import UnavailableError

STOP_SECONDS = 15.0
_LISTENS = re.compile(r"listening on (http\S+)")
_PR_SET_PDEATHSIG = 1


class ServerChild(Closing):
    """Serves at ``url`` on a free port of this host while the block runs.

    Raises UnavailableError, with the server's own words, if it does not start.
    """

    def __init__(self, arguments: Sequence[str]) -> None:
        """``arguments`` are those of ``expert-run serve``."""
        self._stack = ExitStack()
        self._process: subprocess.Popen[str] | None = None
        try:
            self.url = self._start(arguments)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Ends the server."""
        process, self._process = self._process, None
        if process is not None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._stack.close()

    def _start(self, arguments: Sequence[str]) -> str:
        log = self._stack.enter_context(tempfile.TemporaryFile())  # noqa: SIM115
        command = "from expertd_inference.cli import main; main()"
        self._process = process = subprocess.Popen(
            [sys.executable, "-c", command, "serve", "--port", "0", *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            errors="replace",
            # Ctrl-C is for the conversation.
            start_new_session=True,
            # This thread is the main one: it ends with this process, however that ends.
            preexec_fn=_end_with_parent,
        )
        assert process.stdout is not None
        self._stack.enter_context(process.stdout)
        for line in process.stdout:
            if (found := _LISTENS.search(line)) is not None:
                return found[1]
        log.seek(0)
        said = log.read().decode(errors="replace").strip().splitlines()
        reason = said[-1].strip() if said else "it said nothing."
        raise UnavailableError(f"The server did not start: {reason.removeprefix('expert-run: ')}")


def _end_with_parent() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
