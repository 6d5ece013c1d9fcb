"""Up to how many rows our own products are faster than torch's: measured, for each form of matrix.

Ours read a matrix once for all rows and decode it as they go; torch's want it dequantized, once
for all rows, and then are at their best with many. Where that is more depends on the processor,
its instruction sets, the number of threads and the matrix, so a host measures it, some milliseconds
for each form that meets many rows, and remembers it in ``~/.cache/expertd/switching.json``. So all
workers of a host, who share it, switch at the same number of rows.
"""

import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from expertstore.pack.layout import Matrix

MostRows = Callable[[Matrix, torch.dtype], int | None]
"""Up to how many rows of a dtype a matrix is multiplied by our kernels; None: any number."""

Product = Callable[[Matrix, Tensor], object]
"""Multiplies rows [n, in] by a matrix of that form, whatever its values are."""

STEPS = (32, 128, 512)
"""Numbers of rows at which both are tried."""
LEAST = 8
"""Up to here ours are taken unmeasured: they read the weights, and torch's read and write more."""
SMALL = 1 << 18
"""Of matrices with fewer weights ours are always taken: there is little to gain."""
MARGIN = 0.9
"""Torch's must take less than so much of our time: what is near is decided by noise."""
_OUTPUTS_PER_THREAD = 256
_RUNS = 2


def any_number(_: Matrix, __: torch.dtype) -> int | None:
    """Our products for any number of rows: the bits of a row never depend on it."""
    return None


class Switching:
    """A :data:`MostRows` that measures once and remembers; ``path`` is its file."""

    def __init__(
        self,
        ours: Product,
        torchs: Product,
        host: str,
        *,
        path: Path | None = None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """``host`` names what the result depends on besides matrix, dtype and threads."""
        self._ours, self._torchs, self._host = ours, torchs, host
        self._path = path or default_path()
        self._clock = clock
        self.known: dict[str, int | None] = {}
        """What this process has asked for, by form of matrix."""

    def __call__(self, matrix: Matrix, dtype: torch.dtype) -> int | None:
        """Up to how many rows of ``dtype`` ours are faster."""
        if matrix.out_features * matrix.in_features < SMALL:
            return None
        form = form_of(matrix, dtype)
        if form not in self.known:
            self.known[form] = self._remembered(form, matrix, dtype)
        return self.known[form]

    def _remembered(self, form: str, matrix: Matrix, dtype: torch.dtype) -> int | None:
        key = f"{self._host} {form}"
        found = _read(self._path)
        if key not in found:
            # Another worker may have measured meanwhile; the last one to write is believed.
            found[key] = self._measure(matrix, dtype)
            with suppress(OSError):  # a home that cannot be written to costs it at each start
                self._path.parent.mkdir(parents=True, exist_ok=True)
                beside = self._path.with_name(f"{self._path.name}.{os.getpid()}")
                beside.write_bytes(msgspec.json.encode(_read(self._path) | {key: found[key]}))
                beside.replace(self._path)
        return found[key]

    def _measure(self, matrix: Matrix, dtype: torch.dtype) -> int | None:
        # Of many outputs some, a multiple of what shares bytes and meta groups.
        most = _OUTPUTS_PER_THREAD * torch.get_num_threads()
        sample = msgspec.structs.replace(matrix, out_features=min(matrix.out_features, most))
        fewer = LEAST
        for count in STEPS:
            rows = torch.full((count, matrix.in_features), 1e-2, dtype=dtype)
            if self._seconds(self._torchs, sample, rows) < MARGIN * self._seconds(
                self._ours, sample, rows
            ):
                return fewer
            fewer = count
        return None

    def _seconds(self, product: Product, matrix: Matrix, rows: Tensor) -> float:
        seconds = []
        for _ in range(_RUNS):
            begin = self._clock()
            product(matrix, rows)
            seconds.append(self._clock() - begin)
        return min(seconds)


def form_of(matrix: Matrix, dtype: torch.dtype) -> str:
    """What tells one form of matrix from another."""
    own = f"{matrix.encoding} {matrix.bits} {matrix.group_size} {matrix.meta_group_size}"
    rows = str(dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    return f"{matrix.out_features} x {matrix.in_features} {own} by {rows} on {threads} threads"


def default_path() -> Path:
    """``switching.json`` in the user's cache directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "expertd" / "switching.json"


def _read(path: Path) -> dict[str, int | None]:
    """What is remembered; whatever is wrong with the file, nothing."""
    try:
        found = msgspec.json.decode(path.read_bytes(), type=dict[str, int | None])
    except (OSError, ValueError):
        return {}
    return {key: most for key, most in found.items() if most is None or most in (LEAST, *STEPS)}
