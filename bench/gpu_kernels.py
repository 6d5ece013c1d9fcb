"""The GPU's kernels beside what the GPU can do: part of ``make gpu-bench``.

One token's experts, for every scheme at the shapes of Mixtral-8x7B and Qwen3-30B-A3B, in GB/s of
packed bytes beside the rate of a device-to-device copy (read and written bytes); 512 tokens'
experts in TFLOP/s beside a dense product of torch's of as many operations; a quantized linear
layer beside torch's own int4 product and, where it is installed, gemlite's. Each is measured in
turns with its limit. Calls are captured in CUDA graphs, and every call of a graph takes other
experts, so that nothing comes from a cache. It takes a few minutes, mostly compiling.

With --tune it tries other block sizes than those of kernels/triton_blocks.py instead, and shows
the best beside the table's; put into the table what wins.

Example: python -m bench.gpu_kernels --scheme 4g64 --shape qwen3-30b-a3b --json
"""

import argparse
import itertools
import json
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from rich.console import Console
from torch import Tensor

from bench.figures import compared, timed
from bench.gpu_figures import GpuFigure, of_gpu
from bench.gpu_peers import gemlite_product, torch_int4_product
from bench.store import show
from expertd.pack.layout import Matrix, RecordLayout, matrix_parts, record_layout
from expertd.pack.manifest import GateOrder
from expertd.packing.codec import TORCH_DTYPES
from expertd.packing.schemes import MXFP4, parse_precision
from expertd_inference.activation import Activation, ActivationKind
from expertd_inference.kernels.gpu_choice import gpu_kernels
from expertd_inference.kernels.reference import DOWN, GATE_UP, ExpertsSpec
from expertd_inference.kernels.triton_blocks import GemvBlocks, gemv_blocks
from expertd_inference.kernels.triton_form import Form, record_form
from expertd_inference.kernels.triton_gemv import launch_experts_gemv
from expertd_inference.kernels.weights import QuantizedWeight

SCHEMES = ("16", "8g128", "4g64", "3g64m", "2g16m", "mxfp4")
LINEAR_SCHEMES = ("8g128", "4g64", "4g64m")
MANY_TOKENS = 512
LAUNCHES_OF_EXPERTS = 2
"""Of our kernels, for the experts of a token: one a matrix."""
SILU = Activation(ActivationKind.SILU)


@dataclass(frozen=True)
class Shape:
    """Experts [2 * inner, hidden] and [hidden, inner], of which a token takes ``top_k``."""

    name: str
    hidden: int
    inner: int
    top_k: int


SHAPES = (Shape("qwen3-30b-a3b", 2048, 768, 8), Shape("mixtral-8x7b", 4096, 14336, 2))
TINY = Shape("tiny", 256, 64, 2)


@dataclass(frozen=True)
class Run:
    """How to measure: on ``device``, which is the CPU only to see this program work."""

    device: str
    rounds: int
    calls: int
    """In one graph."""
    cache_bytes: int
    """Of different experts: many times what the GPU's own cache holds."""


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


class Copy:
    """The probe: a copy inside the device's memory, larger than any cache."""

    def __init__(self, run: Run) -> None:
        self._source = torch.zeros(run.cache_bytes // 4, dtype=torch.uint8, device=run.device)
        self._target = torch.zeros_like(self._source)
        self.num_bytes = 2 * self._source.nbytes

    def run(self) -> None:
        """Copies."""
        self._target.copy_(self._source)


class CachedLayer:
    """A device cache full of random experts, each of another expert's number."""

    def __init__(self, run: Run, shape: Shape, scheme: str) -> None:
        chosen = MXFP4 if scheme == "mxfp4" else parse_precision(scheme)
        matrices = (
            chosen.matrix(GATE_UP, 2 * shape.inner, shape.hidden),
            chosen.matrix(DOWN, shape.hidden, shape.inner),
        )
        self._run, self._shape = run, shape
        self._layout = record_layout(matrices, "BF16", has_bias=False)
        record = random_record(self._layout, run.device)
        self._num = max(shape.top_k, run.cache_bytes // self._layout.record_bytes)
        # The same values in other places: what is read matters, and not what it says.
        self._cache = record.repeat(self._num, 1)
        self._slot_of = torch.arange(self._num, dtype=torch.int32, device=run.device)
        self._spec = ExpertsSpec(
            self._layout, GateOrder.CONCATENATED, torch.nn.functional.silu, SILU
        )
        self.token_bytes = run.calls * shape.top_k * sum(p.num_bytes for p in self._layout.parts)

    def form(self, name: str) -> Form:
        """The kernels' own description of a matrix."""
        return record_form(self._layout, name)

    def matrix_bytes(self, name: str) -> int:
        """What one graph of :meth:`matrix` reads."""
        parts = sum(p.num_bytes for p in self._layout.parts if p.name.startswith(f"{name}."))
        return self._run.calls * self._shape.top_k * parts

    def tokens(self, num_tokens: int) -> Callable[[], None]:
        """A graph of calls for so many tokens; each call for other experts."""
        shape, device = self._shape, self._run.device
        hidden = torch.randn(num_tokens, shape.hidden, device=device).bfloat16()
        slots = torch.zeros(num_tokens, shape.top_k, shape.hidden, device=device)
        weights = torch.full((num_tokens, shape.top_k), 0.5, device=device)
        fill = gpu_kernels().fill_slots_cached
        return captured(
            self._run,
            [
                lambda index=index: fill(
                    slots,
                    hidden,
                    index,
                    weights,
                    cache=self._cache,
                    slot_of=self._slot_of,
                    spec=self._spec,
                )
                for index in self._routings(num_tokens)
            ],
        )

    def matrix(self, name: str, blocks: GemvBlocks) -> Callable[[], None]:
        """A graph of calls for one token and one matrix, with these block sizes."""
        shape, device = self._shape, self._run.device
        gated = name == GATE_UP
        x = torch.randn(1 if gated else shape.top_k, shape.hidden if gated else shape.inner)
        x = x.to(device, torch.bfloat16)
        out = torch.zeros(shape.top_k, shape.inner, device=device, dtype=torch.bfloat16)
        if not gated:
            out = torch.zeros(1, shape.top_k, shape.hidden, device=device)
        weights = torch.full((1, shape.top_k), 0.5, device=device)
        form = self.form(name)
        return captured(
            self._run,
            [
                lambda index=index: launch_experts_gemv(
                    out,
                    x,
                    index,
                    weights,
                    self._slot_of,
                    self._cache,
                    form,
                    SILU if gated else None,
                    blocks,
                )
                for index in self._routings(1)
            ],
        )

    def dense(self, num_tokens: int) -> tuple[Callable[[], None], int]:
        """Torch's product of as many operations as the experts of the tokens take, and these."""
        shape, device = self._shape, self._run.device
        rows = num_tokens * shape.top_k
        x = torch.randn(rows, shape.hidden, device=device).bfloat16()
        weight = torch.randn(3 * shape.inner, shape.hidden, device=device).bfloat16()
        actions = [lambda: torch.nn.functional.linear(x, weight)] * self._run.calls
        operations = self._run.calls * 2 * rows * 3 * shape.inner * shape.hidden
        return captured(self._run, actions), operations

    def _routings(self, num_tokens: int) -> Iterator[Tensor]:
        k = self._shape.top_k
        for call in range(self._run.calls):
            if num_tokens == 1:
                chosen = torch.arange(call * k, (call + 1) * k) % self._num
                yield chosen.view(1, k).to(self._run.device)
            else:
                chosen = torch.rand(num_tokens, min(self._num, 128)).topk(k).indices
                yield chosen.to(self._run.device)


def captured(run: Run, actions: Sequence[Callable[[], object]]) -> Callable[[], None]:
    """All ``actions`` as one CUDA graph; on the CPU, one after another."""
    if run.device == "cpu":
        return lambda: [action() for action in actions] and None
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for action in actions:  # compiles, and allocates
            action()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for action in actions:
            action()
    return graph.replay


def turns(
    run: Run, ours: Callable[[], None], our_work: int, limit: Callable[[], None], limit_work: int
) -> list[tuple[float, float]]:
    """Giga-units of work a second, of ours and of the limit, in turns."""
    return [
        (our_work / seconds(run, ours) / 1e9, limit_work / seconds(run, limit) / 1e9)
        for _ in range(run.rounds)
    ]


def bounded(
    run: Run, ours: Callable[[], None], num_bytes: int, num_launches: int, copy: "Copy"
) -> tuple[list[tuple[float, float]], str]:
    """GB/s of ours and of the bound, in turns, and the bound: memory or launches.

    A call of few bytes cannot be faster than kernels that do nothing are launched.
    """
    one = torch.zeros(32, device=run.device)
    launches = captured(run, [lambda: one.add_(1)] * num_launches)
    memory_seconds = num_bytes * seconds(run, copy.run) / copy.num_bytes
    if seconds(run, launches) > memory_seconds:
        return turns(run, ours, num_bytes, launches, num_bytes), "launches"
    return turns(run, ours, num_bytes, copy.run, copy.num_bytes), "memory"


def seconds(run: Run, action: Callable[[], None]) -> float:
    """What a call takes on the device, once it is warm."""
    if run.device == "cpu":
        return timed(action)
    action()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(3):
        action()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 3e3


def random_parts(matrix: Matrix, device: str) -> dict[str, Tensor]:
    """Parts of a matrix: random integers, scales near those of real weights."""
    parts = {}
    for name, shape, dtype in matrix_parts(matrix, "BF16"):
        if dtype == "U8":
            high = 128 if matrix.encoding == "mxfp4" and name.endswith(".scale") else 256
            part = torch.randint(high - 10 if high == 128 else 0, high, shape, device=device)
        else:
            part = torch.full(shape, 0.01, device=device)
        parts[name] = part.to(TORCH_DTYPES[dtype])
    return parts


def random_record(layout: RecordLayout, device: str) -> Tensor:
    """The bytes [1, record_bytes] of one expert."""
    record = torch.zeros(1, layout.record_bytes, dtype=torch.uint8, device=device)
    for matrix in layout.matrices:
        for name, tensor in random_parts(matrix, device).items():
            part = layout.part(name)
            piece = record[0, part.offset : part.offset + part.num_bytes]
            piece.copy_(tensor.contiguous().view(torch.uint8).flatten())
    return record


if __name__ == "__main__":
    sys.exit(main())
