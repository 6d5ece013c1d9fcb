"""Other libraries' 4-bit products on a GPU, as actions to be timed beside ours.

Each takes weights of its own making and layout: what is compared is speed. What a library does
not support it refuses with an exception of its own.
"""

from collections.abc import Callable
from importlib import import_module

import torch
from torch import Tensor

from expertstore.pack.layout import Matrix


def torch_int4_product(matrix: Matrix, x: Tensor) -> Callable[[], Tensor]:
    """Torch's own kernel, which torchao uses too: 4 bit, bfloat16, a layout of its own."""
    if matrix.bits != 4 or matrix.meta_group_size:
        raise ValueError("it has 4 bits and 16-bit scales only")
    rows, columns, group = matrix.out_features, matrix.in_features, matrix.group_size
    packed = torch.randint(0, 256, (rows, columns // 2), dtype=torch.uint8, device=x.device)
    weight = torch.ops.aten._convert_weight_to_int4pack(packed, 8)
    scales = torch.full((columns // group, rows, 2), 0.01, device=x.device, dtype=torch.bfloat16)

    def product() -> Tensor:
        result: Tensor = torch.ops.aten._weight_int4pack_mm(x, weight, group, scales)
        return result

    product()
    return product


def gemlite_product(matrix: Matrix, x: Tensor) -> Callable[[], Tensor]:
    """Those of gemlite, in float16, with its own choice of kernel."""
    if matrix.bits == 3 or matrix.meta_group_size:
        raise ValueError("it has no 3 bits and 16-bit scales only")
    core = import_module("gemlite.core")
    rows, columns, group = matrix.out_features, matrix.in_features, matrix.group_size
    layer = core.GemLiteLinear(
        matrix.bits,
        group_size=group,
        in_features=columns,
        out_features=rows,
        input_dtype=core.DType.FP16,
        output_dtype=core.DType.FP16,
    )
    q = torch.randint(0, 1 << matrix.bits, (rows, columns), dtype=torch.uint8, device=x.device)
    scales = torch.full((rows, columns // group), 0.01, dtype=torch.float16, device=x.device)
    layer.pack(q, scales, torch.full_like(scales, 7.0), None)
    half = x.half()

    def product() -> Tensor:
        result: Tensor = layer(half)
        return result

    product()
    return product
