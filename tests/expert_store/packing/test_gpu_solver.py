"""HQQ on a GPU, which packing takes if it is asked to."""

import pytest
import torch

pytest.importorskip("hqq", reason="HQQ is not among what a GPU host needs")

from expertd.packing.hqq_solver import HqqSolver
from expertd.packing.quantizer import quantize
from expertd.packing.schemes import parse_precision
from expertd.packing.solver import choose_solver
from expertstore.pack.codec import dequantize


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
@pytest.mark.parametrize("text", ["4g64", "2g16m"])
def test_hqq_on_a_gpu_is_as_good(text: str) -> None:
    weight = 0.02 * torch.randn(256, 4096, generator=torch.Generator().manual_seed(0))
    matrix = parse_precision(text).matrix("m", 256, 4096)
    errors = []
    for solver in (choose_solver("cuda").solver, HqqSolver()):
        parts = quantize(weight.bfloat16(), matrix, optimize=True, solver=solver)
        errors.append((dequantize(matrix, parts, torch.float32) - weight).norm().item())
    assert errors[0] < 1.02 * errors[1]  # it solves in fp16
