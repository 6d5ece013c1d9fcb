"""Up to how many rows our own products are faster than torch's: measured, for each form of matrix.

Ours read a matrix once for all rows and decode it as they go; torch's want it dequantized, once
for all rows, and then are at their best with many. Where that is more depends on the processor,
its instruction sets, the number of threads and the matrix, so a host measures it when an engine
opens, a quarter of a second for each form, and remembers it in ``~/.cache/expertd/switching.json``.
So all workers of a host, who share it, switch at the same number of rows.
"""

import fcntl
import os
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path

import msgspec
import torch
from torch import Tensor

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
MAX_WAIT_SECONDS = 20.0
"""For another worker that measures; one that was stopped meanwhile holds up no other for longer."""
_OUTPUTS_PER_THREAD = 256
_RUNS = 2
_POLL_SECONDS = 0.02


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
        self._known: dict[str, int | None] = {}
        self._trouble = ""
        """What is wrong with the file, in a sentence, until it was said."""

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
        if self._trouble:
            say(self._trouble)
            self._trouble = ""
        return {name: self._known[name] for name in sorted(wanted)}

    def _learn(self, wanted: Mapping[str, Form]) -> None:
        if not wanted:
            return
        keys = {name: f"{self._host} {name}" for name in wanted}
        found = self._read()
        if not set(keys.values()) <= found.keys():
            with _alone(self._path):
                # Another worker may have measured meanwhile.
                found = self._read()
                for name, key in keys.items():
                    if key not in found:
                        found[key] = self._measure(*wanted[name])
                self._write(found)
        self._known |= {name: found[key] for name, key in keys.items()}

    def _read(self) -> dict[str, int | None]:
        """What is remembered; whatever is wrong with the file, nothing."""
        if self._path is None:
            return {}
        try:
            found = msgspec.json.decode(self._path.read_bytes(), type=dict[str, int | None])
        except FileNotFoundError:
            return {}
        except (OSError, ValueError) as error:
            why = getattr(error, "strerror", None) or "it is damaged"
            self._trouble = f"{self._path} could not be read ({why}), and is written anew."
            return {}
        return {key: most for key, most in found.items() if most is None or most in (LEAST, *STEPS)}

    def _write(self, found: Mapping[str, int | None]) -> None:
        each_start = "so each start measures anew from how many rows on torch multiplies"
        if self._path is None:
            self._trouble = f"There is no home directory, {each_start}; set XDG_CACHE_HOME."
            return
        beside = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        try:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            beside.write_bytes(msgspec.json.encode(found))
            beside.replace(self._path)
        except OSError as error:
            self._trouble = (
                f"{self._path} cannot be written ({error.strerror}), {each_start}; make it "
                "writable, or set XDG_CACHE_HOME."
            )
            with suppress(OSError):
                beside.unlink(missing_ok=True)

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
    own = f"{matrix.encoding} {matrix.bits} {matrix.group_size} {matrix.meta_group_size}"
    rows = str(dtype).removeprefix("torch.")
    threads = torch.get_num_threads()
    return f"{matrix.out_features} x {matrix.in_features} {own} by {rows} on {threads} threads"


def default_path() -> Path | None:
    """``switching.json`` in the user's cache directory; None for a user without a home."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "expertd" / "switching.json"
    except RuntimeError:
        return None


@contextmanager
def _alone(path: Path | None) -> Iterator[None]:
    """While no other worker measures for the file at ``path``, where that can have a lock."""
    lock = None if path is None else _open_lock(path.with_name(f"{path.name}.lock"))
    if lock is None:
        yield
        return
    try:
        deadline = time.monotonic() + MAX_WAIT_SECONDS
        while _is_locked_by_another(lock) and time.monotonic() < deadline:
            time.sleep(_POLL_SECONDS)
        yield
    finally:
        os.close(lock)


def _open_lock(path: Path) -> int | None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:
        return None


def _is_locked_by_another(descriptor: int) -> bool:
    """Else it is ours now, or its file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False
