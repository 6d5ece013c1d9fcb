"""How fast quantized matrices are multiplied with several rows of activations: ``make bench-rows``.

One core, by the time that its thread had, in thousand millions of products a second: two planes of
activations and one, beside the library of another build (``--against``), in turns. ``cache`` and
``hot``: one matrix, which stays in the second or third cache; of the other shapes there are as many
matrices as no cache holds, one after the other.

Example: python -m bench.rows --precision 4g64 --rows 8 --against old/libexpertd_kernels.so
"""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from expertd.packing.quantizer import quantize
from expertd_inference.kernels.cpu.library import (
    EIGHT_BIT_ACTIVATIONS,
    EXACT,
    TYPES,
    native_library,
)
from expertd_inference.kernels.cpu.native import isa, matrix_of
from expertd_inference.kernels.cpu.structures import LinearCall
from expertd_inference.kernels.weights import QuantizedWeight
from expertd_testing.forms import is_kept, named, random_parts

PRECISIONS = (
    *("4g64", "8g128", "3g64m", "2g16m"),
    *("mxfp4", "nvfp4", "mxfp8", "fp8:128x128", "int4g32", "int4g128"),
)
ROWS = (1, 2, 4, 8, 16, 32, 64, 512)
SHAPES = {  # out, in
    "cache": (512, 2048),
    "hot": (2048, 2048),
    "hot-wide": (512, 14336),
    "trunk": (4096, 2048),
    "wide": (2048, 14336),
}
HOT = ("cache", "hot", "hot-wide")
COLD_BYTES = 96 << 20


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    description, _, epilog = (__doc__ or "").partition("\n\nExample:")
    parser = argparse.ArgumentParser(
        prog="python -m bench.rows",
        description=description,
        epilog=f"Example:{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--precision", action="append", help="may be repeated")
    parser.add_argument("--rows", action="append", type=int, help="may be repeated")
    parser.add_argument("--shape", choices=SHAPES, default="hot")
    parser.add_argument("--against", type=Path, help="a library of the same calls")
    parser.add_argument("--isa", help="an instruction set other than this processor's best")
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args(arguments)
    loaded = native_library()
    if loaded.library is None:
        parser.error(f"there are no native kernels: {loaded.reason}")
    libraries: dict[str, tuple[ctypes.CDLL, int]] = {
        "alone": (loaded.library, 0),
        "two planes": (loaded.library, EXACT),
        "one plane": (loaded.library, EXACT | EIGHT_BIT_ACTIVATIONS),
    }
    if options.against:
        other = ctypes.CDLL(str(options.against))
        other.expertd_linear.argtypes = [ctypes.c_void_p]
        libraries["against"] = (other, 0)
    if options.isa:
        for library, _ in libraries.values():
            library.expertd_use_isa.restype = ctypes.c_char_p
            if library.expertd_use_isa(options.isa.encode()) is None:
                parser.error(f"this processor or library has no {options.isa}")
    table = Table(
        "precision", "rows", *libraries, title=f"{options.shape}: GMAC/s, one core, {isa()}"
    )
    for precision in options.precision or PRECISIONS:
        weights = weights_of(precision, *SHAPES[options.shape], options.shape not in HOT)
        for num_rows in options.rows or ROWS:
            rates = measure(weights, num_rows, list(libraries.values()), options.rounds)
            table.add_row(precision, str(num_rows), *(f"{rate:.1f}" for rate in rates))
    Console().print(table)


def weights_of(precision: str, rows: int, columns: int, cold: bool) -> list[QuantizedWeight]:
    """Matrices of one precision: copies of one, if they are to come from memory."""
    generator = torch.Generator().manual_seed(1)
    matrix = named(precision, "w", rows, columns)
    if is_kept(matrix):
        parts = random_parts(matrix, generator, "BF16")
    else:
        values = torch.randn(rows, columns, generator=generator)
        parts = quantize(values / columns**0.5, matrix, optimize=False)
    num_bytes = sum(part.nbytes for part in parts.values())
    copies = -(-COLD_BYTES // num_bytes) if cold else 1
    return [
        QuantizedWeight(matrix, {name: part.clone() for name, part in parts.items()})
        for _ in range(copies)
    ]


def measure(
    weights: Sequence[QuantizedWeight],
    num_rows: int,
    libraries: Sequence[tuple[ctypes.CDLL, int]],
    rounds: int,
) -> list[float]:
    """GMAC/s of each library with its flags, the median of ``rounds``."""
    matrices = [matrix_of(weight) for weight in weights]
    form = weights[0].matrix
    rows = torch.randn(num_rows, form.in_features).bfloat16()
    out = rows.new_empty(num_rows, form.out_features)
    macs = num_rows * form.in_features * form.out_features
    calls = max(len(matrices), int(4e8 / macs))
    turns: list[list[float]] = [[] for _ in libraries]

    def run(library: ctypes.CDLL, flags: int) -> Callable[[int], None]:
        made = [
            LinearCall(
                ctypes.addressof(matrix), rows.data_ptr(), out.data_ptr(), num_rows,
                TYPES[rows.dtype], 1, flags,
            )
            for matrix in matrices
            if matrix is not None
        ]  # fmt: skip
        return lambda i: library.expertd_linear(ctypes.addressof(made[i % len(made)]))

    runs = [run(library, flags) for library, flags in libraries]
    for call in runs:
        call(0)
    for _ in range(rounds):
        for call, times in zip(runs, turns, strict=True):
            start = time.thread_time()
            for i in range(calls):
                call(i)
            times.append(macs * calls / (time.thread_time() - start) / 1e9)
    return [statistics.median(times) for times in turns]


if __name__ == "__main__":
    main()
