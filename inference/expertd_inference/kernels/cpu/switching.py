"""Up to how many rows our own products are faster than torch's: measured, for each form of matrix.

Ours read a matrix once for all rows and decode it as they go; torch's want it dequantized, once
for all rows, and then are at their best with many. Where that is more depends on the processor,
its instruction sets, the number of threads and the matrix, so a host measures it when an engine
opens, a quarter of a second for each form, and remembers it in ``~/.cache/expertd/switching.json``.
So all workers of a host, who share it, switch at the same number of rows.
"""

import time
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import msgspec
import torch
from torch import Tensor

from expertd_inference.process.measured import MeasuredOnce, cache_file
from expertstore.pack.layout import Matrix

MostRows = Callable[[Matrix, torch.dtype], int | None]
"""Up to how many rows of a dtype a matrix is multiplied by our kernels; None: any number."""

Product = Callable[[Matrix, Tensor], object]
"""Multiplies rows [n, in] by a matrix of that form, whatever its values are."""

Form = tuple[Matrix, torch.dtype]
"""A matrix, and the dtype of the rows that it is multiplied with."""

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
        self._clock = clock
        self._known: dict[str, int | None] = {}
        self._remembered = MeasuredOnce(
            path or cache_file("switching.json"),
            msgspec.json.Decoder(dict[str, int | None]),
            "from how many rows on torch multiplies",
            lambda most: most is None or most in (LEAST, *STEPS),
        )

    def __call__(self, matrix: Matrix, dtype: torch.dtype) -> int | None:
        """Up to how many rows of ``dtype`` ours are faster."""
        if not _is_large(matrix):
            return None
        form = form_of(matrix, dtype)
        if form not in self._known:
            self._learn({form: (matrix, dtype)})
        return self._known[form]

    def measure(
        self, forms: Iterable[Form], say: Callable[[str], None] = lambda _: None
    ) -> dict[str, int | None]:
        """What calling it gives for each form that is worth it, by :func:`form_of`.

        What this host does not remember is measured now. ``say`` is told once if the file is
        damaged or cannot be kept.
        """
        wanted = {form_of(*form): form for form in forms if _is_large(form[0])}
        self._learn({name: form for name, form in wanted.items() if name not in self._known})
        self._remembered.say_trouble(say)
        return {name: self._known[name] for name in sorted(wanted)}

    def _learn(self, wanted: Mapping[str, Form]) -> None:
        if not wanted:
            return
        form_by = {f"{self._host} {name}": form for name, form in wanted.items()}
        found = self._remembered.values(form_by, lambda key: self._measure(*form_by[key]))
        self._known |= dict(zip(wanted, found.values(), strict=True))

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


def _is_large(matrix: Matrix) -> bool:
    return matrix.out_features * matrix.in_features >= SMALL


def form_of(matrix: Matrix, dtype: torch.dtype) -> str:
    """What tells one form of matrix from another."""
    group = (
        f"{matrix.group_rows} x {matrix.group_size}" if matrix.group_rows > 1 else matrix.group_size
    )
    own = f"{matrix.encoding} {matrix.bits} {group} {matrix.meta_group_size}"
    rows = str(dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    return f"{matrix.out_features} x {matrix.in_features} {own} by {rows} on {threads} threads"
