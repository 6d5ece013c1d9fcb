"""What quantizing costs on this host, beside hqq: ``make bench-quantize``.

First a matrix of Mixtral's shape per scheme: seconds and relative error, of the native solver and
of hqq on the same cores. hqq gets a slice of its rows, whose seconds are scaled to the whole: a
whole matrix takes it a minute. Then a whole packing of a checkpoint with experts of Mixtral's
shape, written on the spot, read from the disk; and what it comes to for Mixtral-8x7B.

It takes a minute or two, 4 GB of memory and 6 GB of disk; run it on an idle machine, with --dir on
the disk that matters.

Example: python -m bench.quantize --dir /var/tmp --scheme 4bit --json
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import msgspec
import torch
from hqq.core.quantize import Quantizer
from rich.console import Console
from rich.table import Table
from torch import Tensor

from bench.figures import timed
from bench.page_cache import forget_file
from expertd.packing.hqq_solver import HqqSolver
from expertd.packing.packer import Request, pack
from expertd.packing.quantizer import quantize
from expertd.packing.schemes import SCHEMES, choose_scheme
from expertd.packing.solver import Solver, choose_solver
from expertstore.pack.codec import dequantize
from expertstore.pack.layout import Matrix
from expertstore.pack.tensor_file import build_header

HIDDEN, INTERMEDIATE, EXPERTS = 4096, 14336, 8
MIXTRAL_WEIGHTS = 45.1e9
"""Of Mixtral-8x7B's experts."""
SLICE_ROWS = 512
TINY = 16
"""What sizes are divided by to see it work: 128 still divides them."""
_FILE_COLUMNS = 150


@dataclass(frozen=True)
class MatrixRow:
    """A matrix [28672, 4096], gate and up, quantized; seconds are those of the whole matrix."""

    precision: str
    seconds: float
    hqq_seconds: float
    """One call of hqq for the slice, as its users call it; scaled."""
    hqq_pieces_seconds: float
    """hqq in pieces that fit a core's cache, a thread per core; scaled."""
    error: float
    """Of the slice's weights, relative, in the square mean."""
    hqq_error: float


@dataclass(frozen=True)
class PackRow:
    """A whole packing."""

    scheme: str
    optimize: bool
    weights: int
    seconds: float
    mixtral_minutes: float
    """What Mixtral-8x7B's experts take at this rate."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    description, _, epilog = (__doc__ or "").partition("\n\nExample:")
    parser = argparse.ArgumentParser(
        prog="python -m bench.quantize",
        description=description,
        epilog=f"Example:{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--scheme", action="append", choices=[s for s in SCHEMES if s != "bf16"])
    parser.add_argument("--only", choices=["matrices", "packs"], help="one of the two parts")
    parser.add_argument("--dir", type=Path, help="where to pack; default: $TMPDIR or /tmp")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see it work")
    options = parser.parse_args(arguments)
    schemes = options.scheme or ["8bit", "4bit", "paper-3bit", "paper-2bit"]
    scale = TINY if options.quick else 1
    chosen = choose_solver()
    console = Console(stderr=True)
    if chosen.drawback:
        console.print(chosen.drawback)
    matrices: list[MatrixRow] = []
    packs: list[PackRow] = []
    if options.only != "packs":
        weight = random_weights(2 * INTERMEDIATE // scale, HIDDEN // scale)
        for scheme in schemes:
            precision = SCHEMES[scheme].experts
            console.print(f"a matrix in {precision}")
            matrix = precision.matrix("m", *weight.shape)
            matrices.append(measure_matrix(str(precision), weight, matrix, chosen.solver))
        del weight
    if options.only != "matrices":
        with tempfile.TemporaryDirectory(prefix="bench-", dir=options.dir) as name:
            packs += measure_packs(Path(name), schemes, scale, console)
    solver, load = chosen.solver.version, os.getloadavg()[0]
    if options.json:
        report = {
            "matrices": [asdict(row) for row in matrices],
            "packs": [asdict(p) for p in packs],
        }
        print(json.dumps({"solver": solver, **report, "load_average": load}, indent=1))
        return
    if matrices:
        show_matrices(matrices)
    if packs:
        show_packs(packs)
    print(f"{solver}, load average {load:.1f} on {len(os.sched_getaffinity(0))} CPUs")


def measure_matrix(precision: str, weight: Tensor, matrix: Matrix, solver: Solver) -> MatrixRow:
    """Ours on the whole matrix, hqq on its first rows; all on the same cores, one after another."""
    num_rows = min(SLICE_ROWS, weight.shape[0])
    part, factor = weight[:num_rows], weight.shape[0] / num_rows
    small = msgspec.structs.replace(matrix, out_features=num_rows)

    def hqq_once() -> None:
        Quantizer.quantize(
            part, nbits=matrix.bits, group_size=matrix.group_size, axis=1, device="cpu"
        )

    quantize(part, small, optimize=True, solver=HqqSolver())  # what is loaded when first used
    seconds = min(
        timed(lambda: quantize(weight, matrix, optimize=True, solver=solver)) for _ in range(3)
    )
    hqq_seconds = factor * timed(hqq_once)
    pieces = factor * timed(lambda: quantize(part, small, optimize=True, solver=HqqSolver()))
    errors = []
    for each in (solver, HqqSolver()):
        found = dequantize(small, quantize(part, small, optimize=True, solver=each), torch.float32)
        errors.append(((found - part).norm() / part.float().norm()).item())
    return MatrixRow(precision, seconds, hqq_seconds, pieces, *errors)


def measure_packs(
    folder: Path, schemes: Sequence[str], scale: int, console: Console
) -> Iterator[PackRow]:
    """Each scheme with and without the solver."""
    console.print("writing a checkpoint")
    tiny, source = folder / "tiny", folder / "checkpoint"
    write_checkpoint(tiny, TINY)
    measure_pack(tiny, folder / "pack", schemes[0], optimize=True)  # imports what is needed
    write_checkpoint(source, scale)
    for scheme in schemes:
        for optimize in (True, False):
            console.print(f"packing as {scheme}{'' if optimize else ', without optimizing'}")
            yield measure_pack(source, folder / "pack", scheme, optimize=optimize)


def measure_pack(source: Path, destination: Path, scheme: str, *, optimize: bool) -> PackRow:
    """From a checkpoint that is not in memory to a pack that is on the disk."""
    forget_file(source / "model.safetensors")
    request = Request(source, destination, choose_scheme(scheme), optimize=optimize, force=True)
    seconds = timed(lambda: pack(request))
    weights = (source / "model.safetensors").stat().st_size // 2
    return PackRow(scheme, optimize, weights, seconds, MIXTRAL_WEIGHTS / weights * seconds / 60)


def random_weights(rows: int, columns: int) -> Tensor:
    """Normal weights in bfloat16, drawn block by block."""
    generator = torch.Generator().manual_seed(0)
    blocks = [
        (0.02 * torch.randn(min(1024, rows - row), columns, generator=generator)).bfloat16()
        for row in range(0, rows, 1024)
    ]
    return torch.cat(blocks)


def write_checkpoint(path: Path, scale: int) -> None:
    """A layer of Mixtral in one file, with a small vocabulary."""
    hidden, intermediate, vocabulary = HIDDEN // scale, INTERMEDIATE // scale, 256
    path.mkdir()
    config = {
        "architectures": ["MixtralForCausalLM"], "model_type": "mixtral", "hidden_size": hidden,
        "intermediate_size": intermediate, "num_local_experts": EXPERTS, "num_hidden_layers": 1,
        "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": vocabulary,
        "num_experts_per_tok": 2, "tie_word_embeddings": False,
    }  # fmt: skip
    (path / "config.json").write_text(json.dumps(config))
    layer, key_value = "model.layers.0", hidden // 4
    shapes = {
        "model.embed_tokens.weight": (vocabulary, hidden),
        "lm_head.weight": (vocabulary, hidden),
        "model.norm.weight": (hidden,),
        f"{layer}.input_layernorm.weight": (hidden,),
        f"{layer}.post_attention_layernorm.weight": (hidden,),
        f"{layer}.block_sparse_moe.gate.weight": (EXPERTS, hidden),
        f"{layer}.self_attn.q_proj.weight": (hidden, hidden),
        f"{layer}.self_attn.k_proj.weight": (key_value, hidden),
        f"{layer}.self_attn.v_proj.weight": (key_value, hidden),
        f"{layer}.self_attn.o_proj.weight": (hidden, hidden),
    }
    for expert in range(EXPERTS):
        for name in ("w1", "w3"):
            shapes[f"{layer}.block_sparse_moe.experts.{expert}.{name}.weight"] = (
                intermediate,
                hidden,
            )
        shapes[f"{layer}.block_sparse_moe.experts.{expert}.w2.weight"] = (hidden, intermediate)
    # The same numbers over and over, in rows that start elsewhere each time.
    noise = random_weights(1024, hidden).view(-1).view(torch.uint8).numpy()
    with (path / "model.safetensors").open("wb") as file:
        file.write(build_header([(name, "BF16", shape) for name, shape in shapes.items()]))
        for index, shape in enumerate(shapes.values()):
            left = 2 * shape[0] * (shape[1] if shape[1:] else 1)
            start = 1000 * index
            while left:
                piece = noise[start : start + left]
                file.write(piece.data)
                left -= len(piece)
                start = 0
        file.flush()
        os.fsync(file.fileno())


def show_matrices(rows: Sequence[MatrixRow]) -> None:
    """As a table."""
    table = Table(title="a matrix [28672, 4096], with the solver", title_justify="left")
    for column in ("precision", "ours", "hqq, scaled", "times", "hqq in pieces, scaled", "times",
                   "error", "hqq's"):  # fmt: skip
        table.add_column(column)
    for row in rows:
        table.add_row(
            row.precision,
            f"{row.seconds:.2f} s",
            f"{row.hqq_seconds:.1f} s",
            f"{row.hqq_seconds / row.seconds:.0f}",
            f"{row.hqq_pieces_seconds:.1f} s",
            f"{row.hqq_pieces_seconds / row.seconds:.0f}",
            f"{row.error:.5f}",
            f"{row.hqq_error:.5f}",
        )
    Console(width=None if sys.stdout.isatty() else _FILE_COLUMNS).print(table)


def show_packs(rows: Sequence[PackRow]) -> None:
    """As a table."""
    table = Table(title="a whole packing of a layer", title_justify="left")
    for column in ("scheme", "solver", "seconds", "M weights/s", "Mixtral-8x7B"):
        table.add_column(column)
    for row in rows:
        table.add_row(
            row.scheme,
            "yes" if row.optimize else "no",
            f"{row.seconds:.1f}",
            f"{row.weights / row.seconds / 1e6:.0f}",
            f"{row.mixtral_minutes:.1f} minutes",
        )
    Console(width=None if sys.stdout.isatty() else _FILE_COLUMNS).print(table)


if __name__ == "__main__":
    main()
