"""Random matrices in MXFP4: any bytes are one."""

import math

import torch
from torch import Tensor

from expertd.pack.layout import MXFP4_GROUP_SIZE, Matrix
from expertd.packing.codec import E2M1, E8M0_BIAS, encode

_RMS = math.sqrt(sum(value * value for value in E2M1) / len(E2M1))


def random_mxfp4(matrix: Matrix, generator: torch.Generator) -> dict[str, Tensor]:
    """Parts of ``matrix`` whose weights have about the variance 1 / in_features.

    All sixteen values occur, and scales that differ by up to a factor of 4.
    """
    rows, columns = matrix.out_features, matrix.in_features
    nibbles = torch.randint(16, (rows, columns), generator=generator, dtype=torch.uint8)
    exponent = round(math.log2(columns**-0.5 / _RMS))
    low = E8M0_BIAS + exponent - 1
    scales = torch.randint(
        low, low + 3, (rows, columns // MXFP4_GROUP_SIZE), generator=generator, dtype=torch.uint8
    )
    return {f"{matrix.name}.q": encode(nibbles, matrix.bits), f"{matrix.name}.scale": scales}
