"""How near the CPU kernels come to memory's speed: ``make bench-kernels``.

One token through the experts of a layer, whose weights lie in a read-only shared mapping many
times as large as the caches, beside a plain read of the same mapping by the same threads, in
turns. Then torch's own ways of multiplying, and up to how many tokens of an expert it pays to
decode weights anew for each few of them rather than once for torch's product. The ratios are what
to read: machines differ, and other tenants take their share of the memory's bandwidth.

Example: python -m bench.kernels --shape mixtral-8x7b --precision 4g64 --json
"""

import argparse
import json
import mmap
import os
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict

import numpy
import torch
from rich.console import Console

from bench.figures import Figure, compared, timed
from bench.store import show
from expertd.packing.schemes import parse_precision
from expertd_inference.advice.probes import READ_FORMS
from expertd_inference.kernels.activation import Activation, ActivationKind
from expertd_inference.kernels.arena import ArenaTensors
from expertd_inference.kernels.cpu import native, reference
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.kernels.wave import ExpertsSpec, Routed, Wave
from expertd_inference.kernels.weights import QuantizedWeight
from expertd_testing.forms import is_kept, named
from expertstore.pack.layout import RecordLayout, record_layout
from expertstore.pack.manifest import GateOrder

SHAPES = {"mixtral-8x7b": (4096, 14336, 2), "qwen3-30b-a3b": (2048, 768, 8)}  # H, I, top k
GOALS = {"4g64": 0.85, "3g64m": 0.7, "2g16m": 0.7, "8g128": None, "mxfp4": None, "16": None}
GOALS |= dict.fromkeys(("nvfp4", "mxfp8", "fp8:128x128", "int4g32", "int4g128"))
TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 512)


def main(arguments: Sequence[str] | None = None) -> None:
    """Measures and prints."""
    description, _, epilog = (__doc__ or "").partition("\n\nExample:")
    parser = argparse.ArgumentParser(
        prog="python -m bench.kernels",
        description=description,
        epilog=f"Example:{epilog}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--shape", action="append", choices=SHAPES, help="may be repeated")
    parser.add_argument("--precision", action="append", choices=GOALS, help="may be repeated")
    parser.add_argument("--part", action="append", choices=PARTS)
    parser.add_argument("--threads", type=int, help="default: torch's")
    parser.add_argument("--bytes", type=int, default=1 << 30, help="of the shared mapping")
    parser.add_argument("--rounds", type=int, default=9)
    options = parser.parse_args(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    memory = SharedMemory(options.bytes)
    parts: list[Callable[..., Iterator[Figure]]] = [
        part for name, part in PARTS.items() if options.part is None or name in options.part
    ]
    figures = []
    for part in parts:
        for shape in options.shape or SHAPES:
            precisions = options.precision or list(GOALS)
            for figure in part(memory, shape, precisions, options.rounds):
                figures.append(figure)
                console.print(f"  {figure.what}: {figure.ratio:.2f}", highlight=False)
    load = os.getloadavg()[0]
    if options.json:
        rows = [asdict(figure) for figure in figures]
        print(json.dumps({"figures": rows, "isa": native.use_isa(None), "load_average": load}))
    else:
        show(figures, "the CPU kernels on this host")
        print(f"{torch.get_num_threads()} threads, {native.use_isa(None)}, load average {load:.1f}")


class SharedMemory:
    """A memfd of random bytes, mapped read-only as a worker maps the arena."""

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = num_bytes // mmap.PAGESIZE * mmap.PAGESIZE
        fd = os.memfd_create("bench-kernels")
        os.ftruncate(fd, self.num_bytes)
        self._writable = mmap.mmap(fd, self.num_bytes)
        piece = os.urandom(min(self.num_bytes, 16 << 20))
        for start in range(0, self.num_bytes, len(piece)):
            self._writable[start : start + len(piece)] = piece[: self.num_bytes - start]
        self._mapped = mmap.mmap(fd, self.num_bytes, prot=mmap.PROT_READ)
        os.close(fd)
        if reason := native_library().reason:
            raise SystemExit(f"bench.kernels: {reason}")
        self.address = numpy.frombuffer(self._mapped, dtype=numpy.uint8).ctypes.data
        self.arena = ArenaTensors(self.address, self.num_bytes)
        self._next = 0
        best = {form: statistics.median(self._form(form) for _ in range(5)) for form in READ_FORMS}
        self.form = max(best, key=lambda form: best[form])

    def records(self, layout: RecordLayout) -> list[int]:
        """As many records as fit, with scales that give numbers of everyday size."""
        places = range(0, self.num_bytes - layout.record_bytes + 1, layout.record_bytes)
        start = torch.frombuffer(self._writable, dtype=torch.uint8).data_ptr()
        writable = ArenaTensors(start, self.num_bytes)
        for place in places:
            for part in layout.parts:
                if part.dtype in {"F16", "BF16", "F32"}:
                    writable.part(place, part).fill_(0.01)
                elif part.name.endswith("scale") and part.dtype == "U8":
                    writable.part(place, part).fill_(120)
        return list(places)

    def read(self) -> float:
        """GB/s of a plain read, of the best of several forms of loop."""
        return self._form(self.form)

    def _form(self, form: tuple[int, int]) -> float:
        num_bytes = min(self.num_bytes // 2, 128 << 20)
        self._next = (self._next + num_bytes) % (self.num_bytes - num_bytes + 1)
        place = self.address + self._next // 64 * 64
        threads = torch.get_num_threads()
        seconds = timed(lambda: native.read_memory(place, num_bytes, threads, *form))
        return num_bytes / seconds / 1e9


def experts(
    memory: SharedMemory, shape: str, precisions: Sequence[str], rounds: int
) -> Iterator[Figure]:
    """One token through a layer."""
    _, _, k = SHAPES[shape]
    for precision in precisions:
        layer = Layer(memory, shape, precision)
        calls = max(1, int(1e9 / (k * layer.num_bytes)))
        layer.run(1)
        turns = []
        for _ in range(rounds):
            seconds = timed(lambda: layer.run(1), calls)  # noqa: B023 - called at once
            turns.append((k * layer.num_bytes / seconds / 1e9, memory.read()))
        yield compared("experts", f"{shape} {precision}", "GB/s", turns, at_least=GOALS[precision])


class Layer:
    """Records of a shape and precision, used one after the other so that none is in a cache."""

    def __init__(self, memory: SharedMemory, shape: str, precision: str) -> None:
        self.h, i, self.k = SHAPES[shape]
        matrices = (
            named(precision, "gate_up", 2 * i, self.h),
            named(precision, "down", self.h, i),
        )
        scales = ["BF16" if is_kept(matrix) else "F16" for matrix in matrices]
        layout = record_layout(matrices, "BF16", has_bias=False, scales=scales)
        self.num_bytes = sum(part.num_bytes for part in layout.parts)
        self._records = memory.records(layout)
        self._memory, self._at = memory, 0
        self._spec = ExpertsSpec(
            layout, GateOrder.CONCATENATED, _silu, Activation(ActivationKind.SILU)
        )
        self.kernels = NativeKernels()

    def run(self, num_tokens: int, k: int | None = None) -> None:
        """A layer of ``num_tokens`` tokens that all use the same k experts."""
        k = k or self.k
        records = [self._records[(self._at + j) % len(self._records)] for j in range(k)]
        self._at += k
        routed = Routed(
            torch.ones(num_tokens, self.h, dtype=torch.bfloat16),
            torch.arange(k).expand(num_tokens, k),
            torch.full((num_tokens, k), 1 / k),
        )
        self.kernels.output(routed, Wave(range(k), records, self._memory.arena, self._spec))


def torch_s(
    memory: SharedMemory, shape: str, precisions: Sequence[str], rounds: int
) -> Iterator[Figure]:
    """Torch's own: gate and up of one expert after the other, one token."""
    h, i, _ = SHAPES[shape]
    x = torch.ones(1, h, dtype=torch.bfloat16)
    num_bytes = 2 * i * h * 2
    weights = [
        memory.arena._views["BF16"].as_strided((2 * i, h), (h, 1), n * num_bytes // 2)
        for n in range(max(1, min(64, memory.num_bytes // num_bytes)))
    ]
    yield _torch("bf16 F.linear", shape, memory, rounds, num_bytes, [
        (lambda w=w: torch.nn.functional.linear(x, w)) for w in weights
    ])  # fmt: skip
    num_bytes = i * h + 2 * i * (h // 64) * 4
    copies = max(2, min(64, (256 << 20) // num_bytes))
    packed = [
        torch.ops.aten._convert_weight_to_int4pack_for_cpu(
            torch.randint(0, 16, (2 * i, h), dtype=torch.int32), 2
        )
        for _ in range(copies)
    ]
    scales = [torch.ones(h // 64, 2 * i, 2, dtype=torch.bfloat16) for _ in range(copies)]
    yield _torch("int4pack, group 64", shape, memory, rounds, num_bytes, [
        (lambda n=n: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed[n], 64, scales[n]))
        for n in range(copies)
    ])  # fmt: skip
    matrix = parse_precision("4g64").matrix("w", 2 * i, h)
    parts = {
        "w.q": torch.randint(0, 255, (i, h), dtype=torch.uint8),
        "w.scale": torch.ones(2 * i, h // 64, dtype=torch.float16),
        "w.zero": torch.ones(2 * i, h // 64, dtype=torch.float16),
    }
    weight = QuantizedWeight(matrix, parts)
    hqq = [lambda: reference.linear(x, weight)]
    what = "dequantize, then F.linear (hqq's way)"
    yield _torch(what, shape, memory, min(3, rounds), num_bytes, hqq)


def _torch(
    what: str,
    shape: str,
    memory: SharedMemory,
    rounds: int,
    num_bytes: int,
    actions: Sequence[Callable[[], object]],
) -> Figure:
    turns = []
    for _ in range(rounds):
        start = time.perf_counter()
        for action in actions:
            action()
        seconds = (time.perf_counter() - start) / len(actions)
        turns.append((num_bytes / seconds / 1e9, memory.read()))
    return compared("torch", f"{shape} {what}", "GB/s", turns)


def tokens(
    memory: SharedMemory, shape: str, precisions: Sequence[str], rounds: int
) -> Iterator[Figure]:
    """An expert with so many tokens, by our product and by torch's; below 1 ours is faster."""
    for precision in precisions:
        layer = Layer(memory, shape, precision)
        for num_tokens in TOKENS:
            turns = []
            for _ in range(max(2, rounds // 3)):
                seconds = []
                for most in (None, 0):
                    layer.kernels.most_rows = lambda _, __: most  # noqa: B023 - called at once
                    seconds.append(timed(lambda: layer.run(num_tokens, 1)) * 1e3)  # noqa: B023
                turns.append((seconds[0], seconds[1]))
            yield compared("tokens", f"{shape} {precision} x {num_tokens}", "ms", turns)


def plain(
    memory: SharedMemory, shape: str, precisions: Sequence[str], rounds: int
) -> Iterator[Figure]:
    """A BF16 head of the shape's width: GMAC/s of its rows beside torch's."""
    del precisions
    columns = SHAPES[shape][0]
    outputs = min(32768, memory.num_bytes // 2 // columns)
    weight = memory.arena._views["BF16"].as_strided((outputs, columns), (columns, 1), 0)
    kernels = NativeKernels()
    for num_rows in TOKENS:
        x = torch.ones(num_rows, columns, dtype=torch.bfloat16)
        work = outputs * columns * num_rows / 1e9
        turns = [
            (
                work / timed(lambda: kernels.plain(x, weight)),  # noqa: B023 - called at once
                work / timed(lambda: torch.nn.functional.linear(x, weight)),  # noqa: B023
            )
            for _ in range(max(2, rounds // 3))
        ]
        yield compared("plain", f"{shape} {outputs} outputs x {num_rows}", "GMAC/s", turns)


PARTS = {"experts": experts, "torch": torch_s, "tokens": tokens, "plain": plain}


def _silu(gate_up: torch.Tensor) -> torch.Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return torch.nn.functional.silu(gate) * up


if __name__ == "__main__":
    main()
