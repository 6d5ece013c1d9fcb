"""What the interpreter computes, the compiler takes: for a GPU that need not be there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# With more, not even three blocks of four warps fit on an SM, or two.
MAX_GEMV_REGISTERS, MAX_REGISTERS = 168, 192
ROOT = Path(__file__).parents[4]


def test_every_kernel_compiles(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    # A process of its own: Triton decides when it is imported whether it interprets.
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(tmp_path), "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.inference.kernels.gpu.compile_kernels", "90"],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines()]
    assert {name for _, _, name, _, _ in lines} == {
        "_experts_gemv_kernel",
        "_experts_gemm_kernel",
        "_linear_gemv_kernel",
        "_linear_gemm_kernel",
        "_resolve",
        "_gather",
    }
    for _, compiled_for, name, registers, spilled in lines:
        what = f"{name} for {compiled_for}: {registers} registers, {spilled} bytes spilled"
        assert int(spilled) == 0, what
        most = MAX_GEMV_REGISTERS if "gemv" in name else MAX_REGISTERS
        assert int(registers) <= most, what
