"""The GPU's kernels beside what the GPU can do: part of ``make gpu-bench``.

One token's experts, for every scheme at the shapes of Mixtral-8x7B and Qwen3-30B-A3B, in GB/s of
packed bytes beside the rate of a device-to-device copy (read and written bytes), or beside as many
launches of a kernel that does nothing where these take longer; 512 tokens'
experts in TFLOP/s beside a dense product of torch's of as many operations; a quantized linear
layer beside torch's own int4 product and, where it is installed, gemlite's. Each is measured in
turns with its limit. Calls are captured in CUDA graphs, and every call of a graph takes other
experts, so that nothing comes from a cache. It takes a few minutes, mostly compiling.

With --tune it tries other block sizes than those of kernels/gpu/triton_blocks.py instead, and shows
the best beside the table's; put into the table what wins.

Example: python -m bench.gpu_kernels --scheme 4g64 --shape qwen3-30b-a3b --json
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace

import torch
from rich.console import Console

from bench.figures import compared
from bench.gpu_figures import GpuFigure, of_gpu
from bench.gpu_layers import CachedLayer, Shape, random_parts
from bench.gpu_peers import gemlite_product, torch_int4_product
from bench.gpu_turns import Copy, Run, bounded, captured, turns
from bench.store import show
from expertd.packing.schemes import parse_precision
from expertd_inference.kernels.gpu.choice import gpu_kernels
from expertd_inference.kernels.gpu.triton_blocks import gemv_blocks
from expertd_inference.kernels.weights import QuantizedWeight
from expertstore.pack.layout import DOWN, GATE_UP

SCHEMES = ("16", "8g128", "4g64", "3g64m", "2g16m", "mxfp4")
LINEAR_SCHEMES = ("8g128", "4g64", "4g64m")
MANY_TOKENS = 512
LAUNCHES_OF_EXPERTS = 2
"""Of our kernels, for the experts of a token: one a matrix."""

SHAPES = (Shape("qwen3-30b-a3b", 2048, 768, 8), Shape("mixtral-8x7b", 4096, 14336, 2))
TINY = Shape("tiny", 256, 64, 2)

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FULL = Run(DEVICE, 9, 16, 2 << 30)
QUICK = Run(DEVICE, 1, 1, 1 << 16)
"""Tiny, to see this program work."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    description, _, epilog = (__doc__ or "").partition("\n\nExample:")
    parser = argparse.ArgumentParser(
        prog="python -m bench.gpu_kernels",
        description=description,
        epilog=f"Example:{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--scheme", action="append", choices=SCHEMES, help="may be repeated")
    parser.add_argument("--shape", action="append", choices=[shape.name for shape in SHAPES])
    parser.add_argument("--tune", action="store_true", help="try block sizes")
    parser.add_argument("--quick", action="store_true", help="tiny sizes, to see it work")
    options = parser.parse_args(arguments)
    if not torch.cuda.is_available() and not options.quick:
        parser.error("there is no GPU here; --quick shows on the CPU that the program works")
    run = QUICK if options.quick else FULL
    shapes = [shape for shape in SHAPES if shape.name in (options.shape or [shape.name])]
    shapes = [TINY] if options.quick else shapes
    schemes = options.scheme or (("4g64",) if options.quick or options.tune else SCHEMES)
    say = Console(stderr=True)
    figures = []
    for figure in (tune if options.tune else measure)(run, shapes, schemes, say.print):
        figures.append(figure)
        say.print(f"  {figure.what}: {figure.ours:.3g} {figure.unit}", highlight=False)
    name = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU, interpreted"
    if options.json:
        rows = [asdict(figure) for figure in figures]
        print(json.dumps({"device": name, "torch": torch.__version__, "figures": rows}, indent=1))
    else:
        show(figures, "the GPU's kernels")
        print(f"{name}, torch {torch.__version__}")


def measure(
    run: Run, shapes: Sequence[Shape], schemes: Sequence[str], say: Callable[[str], None]
) -> Iterator[GpuFigure]:
    """What the kernels do with the table's block sizes."""
    copy = Copy(run)
    for shape, scheme in itertools.product(shapes, schemes):
        say(f"{shape.name} in {scheme}")
        layer = CachedLayer(run, shape, scheme)
        goal = 0.7 if scheme in {"3g64m", "2g16m"} else 0.85
        num_launches = LAUNCHES_OF_EXPERTS * run.calls
        turned, bound = bounded(run, layer.tokens(1), layer.token_bytes, num_launches, copy)
        yield of_gpu(
            compared(
                "gemv",
                f"{shape.name} {scheme}, experts of a token",
                "GB/s",
                turned,
                at_least=goal,
            ),
            bound=bound,
        )
        num_tokens = MANY_TOKENS if run.device == "cuda" else 9
        dense, operations = layer.dense(num_tokens)
        turned = turns(run, layer.tokens(num_tokens), operations, dense, operations)
        yield of_gpu(
            compared(
                "gemm",
                f"{shape.name} {scheme}, experts of {num_tokens} tokens",
                "TFLOP/s",
                [(ours / 1000, limit / 1000) for ours, limit in turned],
            ),
            bound="dense product",
        )
    for scheme in LINEAR_SCHEMES:
        say(f"a linear layer in {scheme}")
        yield from measure_linear(run, scheme, copy, say)


def measure_linear(
    run: Run, scheme: str, copy: "Copy", say: Callable[[str], None]
) -> Iterator[GpuFigure]:
    """A layer of Mixtral's size for one token, beside a copy and beside other libraries."""
    rows, columns = (4096, 4096) if run.device == "cuda" else (64, 128)
    matrix = parse_precision(scheme).matrix("weight", rows, columns)
    num_bytes = sum(part.nbytes for part in random_parts(matrix, run.device).values())
    count = max(1, run.cache_bytes // num_bytes)
    weights = [QuantizedWeight(matrix, random_parts(matrix, run.device)) for _ in range(count)]
    x = torch.randn(1, columns, device=run.device, dtype=torch.bfloat16)
    linear = gpu_kernels().linear
    calls = min(count, 4 * run.calls)
    ours = captured(run, [lambda w=w: linear(x, w) for w in weights[:calls]])
    num_bytes *= calls
    what = f"[{rows}, {columns}] in {scheme}, a token"
    turned, bound = bounded(run, ours, num_bytes, calls, copy)
    yield of_gpu(compared("linear", what, "GB/s", turned, at_least=0.85), bound=bound)
    for name, product in {"torch": torch_int4_product, "gemlite": gemlite_product}.items():
        try:
            actions = [product(matrix, x) for _ in weights[:calls]]
            theirs = captured(run, actions)
        except Exception as error:  # each has its own reasons not to serve here
            say(f"{name} is not compared: {str(error).splitlines()[0]}")
            continue
        turned = turns(run, ours, num_bytes, theirs, num_bytes)
        yield of_gpu(compared("linear", f"{what}, beside {name}", "GB/s", turned), bound=name)


def tune(
    run: Run, shapes: Sequence[Shape], schemes: Sequence[str], say: Callable[[str], None]
) -> Iterator[GpuFigure]:
    """The best block sizes for a token's experts beside the table's, per matrix."""
    for shape, scheme, name in itertools.product(shapes, schemes, (GATE_UP, DOWN)):
        layer = CachedLayer(run, shape, scheme)
        table = gemv_blocks(layer.form(name))
        tabled = layer.matrix(name, table)
        best, best_turns = table, [(1.0, 1.0)] * run.rounds
        sizes = ((2, 4, 8, 16, 32), (8, 16, 32, 64), (1, 2, 4, 8))
        if run.device == "cpu":
            sizes = ((4,), (16,), (4,))
        for rows, spans, warps in itertools.product(*sizes):
            tried = replace(table, rows=rows, spans=spans, num_warps=warps)
            num_bytes = layer.matrix_bytes(name)
            try:
                found = turns(run, layer.matrix(name, tried), num_bytes, tabled, num_bytes)
            except Exception as error:  # too many registers or too much shared memory
                say(f"  {tried}: {str(error).splitlines()[0]}")
                continue
            ratio = statistics.median(ours / limit for ours, limit in found)
            if ratio > statistics.median(ours / limit for ours, limit in best_turns):
                best, best_turns = tried, found
                say(f"  {name}: {tried} is {ratio:.2f} of the table's")
        what = (
            f"{shape.name} {scheme} {name}: rows {best.rows}, spans {best.spans}, "
            f"warps {best.num_warps}; table: {table.rows}, {table.spans}, {table.num_warps}"
        )
        yield of_gpu(compared("tune", what, "GB/s", best_turns), bound="the table's")


if __name__ == "__main__":
    sys.exit(main())
