"""Where memory runs out the call says so, and the next one works; no thread ends the process."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from expertd_inference.kernels.cpu.library import native_library
from hatch_build import find_compiler

Make = Callable[..., Any]

pytestmark = pytest.mark.skipif(
    native_library().library is None or find_compiler() is None,
    reason="no native library, or no compiler to make an allocator that fails",
)

ROOT = Path(__file__).parents[4]
SCRIPT = """
import ctypes, sys
from pathlib import Path
import torch
from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.held import HeldSegments
from expertd_inference.execution.program import make_program
from expertd_inference.experts.call import seat_of
from expertd_inference.experts.cpu import experts_modules
from expertd_inference.kernels.cpu import attention
from expertd_inference.kernels.cpu.library import TYPES, native_library
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.kernels.cpu.operations import HeldStep
from expertd_inference.kernels.cpu.linear import LinearKernels, PreparedCall, describe
from expertd_inference.kernels.cpu.structures import LinearCall
from expertd_inference.kernels.wave import Routed, Wave
from expertstore.native import Loaded
from tests.architectures.parity import load
from tests.inference.kernels.cpu.test_native import layer_of, quantized, spec_of
from tests.inference.kernels.cpu.test_reference import routed

torch.set_num_threads(2)
library = native_library().library
allocator = ctypes.CDLL(sys.argv[1])
allocator.fail_after.argtypes = [ctypes.c_long]
allocator.stop_failing.restype = ctypes.c_long
failures = {}


class Failing:
    "A function whose every allocation fails once before the call works."

    def __init__(self, name):
        self.real, self.name = library[name], name
        self.argtypes = getattr(library, name).argtypes
        self.restype = getattr(library, name).restype
        failures[name] = 0

    def __call__(self, *arguments):
        self.real.argtypes, self.real.restype = self.argtypes, self.restype
        count = 0
        while True:
            if self.name == "expertd_held_step":
                HeldStep.from_address(*arguments).num_used = 0
            allocator.fail_after(count)
            status = self.real(*arguments)
            elsewhere = allocator.stop_failing()
            failed = status == FAILED.get(self.name, 1)
            if elsewhere < 0:
                assert (failed, elsewhere) == (False, -1), (self.name, status, elsewhere)
                failures[self.name] += count
                return status
            # Only a thread that does not begin may be done without.
            assert failed or count == 1, (self.name, count)
            assert elsewhere == 0, (self.name, count)
            count += 1


class Library:
    "The library, whose functions that answer whether there was memory are failing ones."

    def __getattr__(self, name):
        return self[name]

    def __getitem__(self, name):
        if name in CHECKED:
            return self.__dict__.setdefault(name, Failing(name))
        return getattr(library, name)


class WithoutMemory:
    "The library, where attention has no memory at all."

    @staticmethod
    def expertd_attend_rows(call):
        allocator.fail_after(0)
        status = library.expertd_attend_rows(call)
        allocator.stop_failing()
        return status


CHECKED = {
    f"expertd_{name}"
    for name in "experts linear dequantize attend_rows".split()
    + "program_make program_run held_step".split()
}
FAILED = {"expertd_program_make": None, "expertd_held_step": -1}
tiled = lambda matrix, dtype: 100
kernels, steps = NativeKernels(most_rows=tiled), LinearKernels(library)
failing_kernels, failing_steps = NativeKernels(most_rows=tiled), LinearKernels(Library())
failing_kernels._library = Library()
libraries = {failing_steps: Loaded(Library()), steps: Loaded(library)}


def same(run):
    "Of both kernels, the failing ones first: they find the scratch memory as small as it was."
    ours, expected = run(failing_kernels, failing_steps), run(kernels, steps)
    for one, other in zip(ours, expected, strict=True):
        assert torch.equal(one, other)


# The scratch memory of a call with more rows than fit anywhere.
weight = torch.randn(64, 64)
rows = torch.randn(1, 64)
matrix = describe(weight, torch.randn(64))
call = LinearCall(ctypes.addressof(matrix), rows.data_ptr(), 0, 1 << 44, TYPES[rows.dtype], 2)
assert library.expertd_linear(ctypes.addressof(call)) == 1
for num_rows in (1, 4, 300):
    x = torch.randn(num_rows, 64)

    def product(kernels, steps):
        out = torch.empty(num_rows, 64)
        steps.multiply(PreparedCall(matrix), x, out, num_rows)
        return [out]

    same(product)
packed = quantized(1024, 256, "4g64")
for num_rows in (1, 2, 40, 200):
    x = torch.randn(num_rows, 256).bfloat16()
    same(lambda kernels, steps: [kernels.linear(x, packed)])
layer = layer_of(8, 256, 128, "4g64", torch.bfloat16)
for tokens in (1, 3, 20):
    index, weights = routed(tokens, 3, 8)
    hidden = torch.randn(tokens, 256).bfloat16()
    routing = Routed(hidden, index, weights)
    wave = Wave(list(range(8)), layer.records, layer.arena, spec_of(layer))
    same(lambda kernels, steps: [kernels.output(routing, wave)])
# One row, and so many that two threads share them.
for num_rows in (1, 700):
    plan = attention.AttentionPlan([(0, num_rows, range(11))])
    query = torch.randn(num_rows, 4, 16)
    key, value = torch.randn(2, num_rows, 2, 16)

    def attended(kernels, steps):
        attention.native_library = lambda: libraries[steps]
        blocks = torch.zeros(2, 11, 2, 64, 16)
        return [attention.attend(plan, *blocks, query, key, value, 0.25)]

    same(attended)
attention.native_library = lambda: Loaded(WithoutMemory)
try:
    attention.attend(plan, *torch.zeros(2, 11, 2, 64, 16), query, key, value, 0.25)
except MemoryError:
    pass
else:
    raise AssertionError("attention without memory has a result")

# A whole model by a program: layer by layer, and in one call.
class Resident:
    "All experts of a source, as if a lease were held of a daemon's directory."

    def __init__(self, source):
        words, self.first = [], {}
        for layer in source.manifest.layers:
            self.first[layer.layer] = len(words)
            places = [source._offsets[layer.layer, e] for e in range(layer.num_experts)]
            assert all(place % 4096 == 0 for place in places)
            words += [place // 4096 + 1 for place in places]
        self.words = (ctypes.c_uint64 * len(words))(*words)
        self.arena_address, self.directory = source.arena_address, ctypes.addressof(self.words)
        self.first_entry, self.release = self.first.get, lambda used: True


model = load(Path(sys.argv[2]), torch.bfloat16, kernels)
executors = [make_program(model, 8, 64) for _ in range(2)]
program = executors[0]
parts = [segment.program for segment in program._segments]
for part in [*parts, program._last, program._assembly.head]:
    part._library = Library()
tokens = list(range(2, 42))
batches = [
    Batch((Span(0, tokens, 0, [0], None, Wanted.ALL),)),
    Batch(
        (
            Span(0, [1], 40, [0], None, Wanted.LAST),
            Span(1, tokens[:9], 0, [1], None, Wanted.LAST),
        )
    ),
    Batch((Span(0, [7], 41, [0], None, Wanted.LAST),)),
]
for held in (False, True):
    if held:
        seats = [seat_of(module) for module in experts_modules(model).values()]
        resident = Resident(seats[0].runner._source)
        seats[0].runner.hold = lambda: resident
        program._held = HeldSegments(program._segments, 64)
        program._held._run = Library().expertd_held_step
    for batch in batches:
        logits = [executor.forward(batch) for executor in executors]
        assert torch.equal(*logits)
    assert not held or program._held.num_done == len(seats)
print(failures)
assert not CHECKED - set(failures), failures
"""


def test_every_allocation_may_fail(tmp_path: Path, packed: Make) -> None:
    compiler = find_compiler()
    assert compiler is not None
    source, allocator = Path(__file__).with_name("failing_allocator.cpp"), tmp_path / "failing.so"
    subprocess.run([*compiler, "-std=c++17", "-shared", "-fPIC", str(source), "-o", str(allocator)],
                   check=True)  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(allocator), str(packed("qwen2_moe", "4bit-fast"))],
        cwd=ROOT,
        env=os.environ | {"LD_PRELOAD": str(allocator)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, (done.returncode, done.stdout, done.stderr)
