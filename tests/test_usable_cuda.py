"""Tests compile kernels where a GPU can be used, and interpret them everywhere else."""

import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from tests import usable_cuda

DRIVER = """
int cuInit(unsigned flags) {{ return {init}; }}
int cuDeviceGetCount(int *count) {{ *count = {count}; return 0; }}
"""


def test_it_is_what_torch_says() -> None:
    assert usable_cuda._torch_is_for_cuda() == (torch.version.cuda is not None)
    assert usable_cuda.is_cuda_usable() == torch.cuda.is_available()


@pytest.mark.skipif(not shutil.which("cc"), reason="there is no C compiler")
@pytest.mark.parametrize(
    ("init", "count", "expected"),
    [
        (0, 2, 2),
        (0, 0, 0),  # all are hidden
        (999, 2, 0),  # a driver without a device, as in a container, or of another version
    ],
)
def test_a_driver_counts_only_if_it_works(
    init: int, count: int, expected: int, tmp_path: Path
) -> None:
    source, library = tmp_path / "driver.c", tmp_path / "libcuda.so"
    source.write_text(DRIVER.format(init=init, count=count))
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, source], check=True)
    assert usable_cuda._num_devices(str(library)) == expected
    assert usable_cuda._num_devices(str(tmp_path / "none.so")) == 0
