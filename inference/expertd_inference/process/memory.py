"""The most memory that this process has used, counted so that shared pages are shared."""

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

_ROLLUP = Path("/proc/self/smaps_rollup")
_INTERVAL_SECONDS = 0.2
_MAX_LOAD = 0.1
"""The share of time that sampling may take: the kernel walks all page tables for it."""


class PeakPss:
    """Samples the proportional set size (PSS) of this process while the block runs.

    In PSS a page that n processes map counts for 1/n: the sum over a host's processes is
    the memory they use together.
    """

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="peak-pss", daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop.set()
        self._thread.join()

    def _sample(self) -> None:
        stopped = False
        while not stopped:
            begin = time.monotonic()
            self.peak_bytes = max(self.peak_bytes, pss_bytes())
            pause = (time.monotonic() - begin) / _MAX_LOAD
            # Looks at the flag before sampling for the last time, so that the end counts.
            stopped = self._stop.wait(max(_INTERVAL_SECONDS, pause))
        self.peak_bytes = max(self.peak_bytes, pss_bytes())


def pss_bytes() -> int:
    """The process's PSS now."""
    for line in _ROLLUP.read_text().splitlines():
        if line.startswith("Pss:"):
            return int(line.split()[1]) * 1024
    raise OSError(f"{_ROLLUP} has no Pss")
