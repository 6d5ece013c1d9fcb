"""Where memory runs out the call says so, and the next one works; no thread ends the process."""

import subprocess
import sys
from pathlib import Path

import pytest

from expertd_inference.kernels.cpu.library import native_library

pytestmark = pytest.mark.skipif(native_library().library is None, reason="no native library")

ROOT = Path(__file__).parents[4]
BEGIN = """
import ctypes, resource, torch
from expertd_inference.kernels.cpu.library import TYPES, LinearCall, native_library
from expertd_inference.kernels.cpu.step import describe, step_kernels
torch.set_num_threads(2)
kernels = step_kernels()
def refused(call):
    try:
        call()
    except MemoryError as error:
        print(error)
    else:
        raise AssertionError("it is said to have worked")
"""
# The scratch memory of a call with more rows than fit anywhere; then of one with fewer.
SCRATCH = """
weight = torch.randn(64, 64)
matrix = describe(weight)
rows = torch.randn(1, 64)
call = LinearCall(ctypes.addressof(matrix), rows.data_ptr(), 0, 1 << 44, TYPES[rows.dtype], 2)
assert native_library().library.expertd_linear(ctypes.addressof(call)) == 1
torch.testing.assert_close(kernels.linear(rows, weight, matrix), rows @ weight.T)
"""
# Scores of a billion keys, which are one row of memory, in each of two threads.
ATTEND = """
query = torch.randn(1, 4, 1, 16)
row = torch.randn(1, 2, 1, 16)
keys = row.expand(1, 2, 1 << 30, 16)
_, hard = resource.getrlimit(resource.RLIMIT_AS)
with open("/proc/self/statm") as statm:
    used = int(statm.read().split()[0]) * resource.getpagesize()
resource.setrlimit(resource.RLIMIT_AS, (used + (1 << 30), hard))
refused(lambda: kernels.attend(query, keys, keys, 1.0))
torch.set_num_threads(1)
refused(lambda: kernels.attend(query, keys, keys, 1.0))
torch.set_num_threads(2)
few = row.expand(1, 2, 1 << 13, 16)
torch.testing.assert_close(
    kernels.attend(query, few, few, 1.0)[0, 0], row[0, [0, 0, 1, 1], 0], rtol=1e-4, atol=1e-4
)
"""


@pytest.mark.parametrize("what", [SCRATCH, ATTEND], ids=["scratch", "a task's own"])
def test_is_said_and_gone_on_from(what: str) -> None:
    command = [sys.executable, "-c", BEGIN + what]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, (done.returncode, done.stderr)
    if what is ATTEND:
        assert done.stdout.count("no memory left for the kernels") == 2
