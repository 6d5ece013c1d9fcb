"""What 8 bits of activations cost in quality: ``make bench-activations``.

Perplexity of the example model on text that it never saw, in windows of its whole context, each
token predicted from at least half of it: packs of several precisions (experts, attention), by
torch's reference kernels and by native ones with activations of 16 bits (two planes) and 8 (one).
All rows of all windows meet quantized weights by them, none by torch. Brackets are the middle half
of 2,000 bootstrap samples of the windows, the same ones for both models of a ratio.

Example: python -m bench.activations --precision 4g64m --windows 20
"""

import argparse
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table

from bench.figures import quartiles
from bench.heldout import EXAMPLE, Heldout, read_heldout
from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_inference.process.attachment import attach
from expertd_inference.settings import KernelsName
from expertd_inference.worker import Worker
from expertd_testing.daemon import serving

PRECISIONS = ("8g128", "4g64m", "3g64m", "2g16m")
CONTEXT = 1024
WAYS = {
    "torch": (KernelsName.REFERENCE, 16),
    "two planes": (KernelsName.NATIVE, 16),
    "one plane": (KernelsName.NATIVE, 8),
}
"""Kernels, and bits of activations."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    description, _, epilog = (__doc__ or "").partition("\n\nExample:")
    parser = argparse.ArgumentParser(
        prog="python -m bench.activations",
        description=description,
        epilog=f"Example:{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--precision", action="append", help="of experts and attention; may be repeated"
    )
    parser.add_argument("--windows", type=int, help="the first ones, instead of all")
    options = parser.parse_args(arguments)
    heldout = read_heldout(CONTEXT, options.windows)
    title = f"held-out perplexity, {heldout.num_tokens:,} tokens in {len(heldout.windows)} windows"
    table = Table("experts, attention", *WAYS, "two planes / torch", "one plane / two", title=title)
    for precision in options.precision or PRECISIONS:
        torchs, two, one = measure(precision, heldout)
        table.add_row(
            precision,
            *(f"{heldout.perplexity(nats):.4f}" for nats in (torchs, two, one)),
            increase(heldout, two, torchs),
            increase(heldout, one, two),
        )
    Console().print(table)


def measure(precision: str, heldout: Heldout) -> Iterator[npt.NDArray[np.float64]]:
    """Nats per window of each of :data:`WAYS`."""
    with tempfile.TemporaryDirectory(prefix="expertd-activations-") as name:
        folder = Path(name)
        pack(Request(EXAMPLE, folder / "pack", choose_scheme("bf16", precision, precision)))
        with serving({"m": folder / "pack"}, ram=64 << 20, socket=folder / "s") as daemon:
            for kernels, activations in WAYS.values():
                worker = Worker(
                    attach("m", daemon.socket),
                    kernels=kernels,
                    exact=kernels is KernelsName.NATIVE,
                    activations=activations,
                )
                try:
                    yield heldout.nats(worker.model)
                finally:
                    worker.close()


def increase(heldout: Heldout, nats: npt.NDArray[np.float64], of: npt.NDArray[np.float64]) -> str:
    """Of the perplexity over that ``of`` others, and its middle half."""
    ratio = heldout.perplexity(nats) / heldout.perplexity(of)
    low, high = quartiles((heldout.resampled(nats) / heldout.resampled(of)).tolist())
    return f"{ratio - 1:+.3%} ({low - 1:+.3%} to {high - 1:+.3%})"


if __name__ == "__main__":
    main()
