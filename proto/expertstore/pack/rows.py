"""The bits of a table's rows: encoded for a pack, and decoded for a model."""

import torch
from torch import Tensor

from expertstore.pack.codec import TORCH_DTYPES
from expertstore.pack.table import TableEncoding, group_size

_LARGEST = {TableEncoding.INT8: 127, TableEncoding.INT4: 7}


def encode_rows(values: Tensor, encoding: TableEncoding, dtype: str) -> Tensor:
    """Rows ``[n, columns]`` of any floating type as stored: uint8 ``[n, row_bytes]``."""
    if encoding is TableEncoding.PLAIN:
        return values.to(TORCH_DTYPES[dtype]).contiguous().view(torch.uint8)
    num_rows, columns = values.shape
    groups = values.float().view(num_rows, -1, group_size(columns))
    most = _LARGEST[encoding]
    scales = (groups.abs().amax(dim=2) / most).half()
    # By the scale as it is stored; of groups that are all zero any will do.
    steps = torch.where(scales == 0, 1.0, scales.float())
    q = (groups / steps[:, :, None]).round_().clamp_(-most, most).view(num_rows, columns)
    if encoding is TableEncoding.INT8:
        packed = q.to(torch.int8).view(torch.uint8)
    else:
        nibbles = (q + 8).to(torch.uint8)
        packed = nibbles[:, 0::2] | nibbles[:, 1::2] << 4
    return torch.cat((packed, scales.view(torch.uint8).view(num_rows, -1)), dim=1)


def decode_rows(stored: Tensor, num_columns: int, encoding: TableEncoding, dtype: str) -> Tensor:
    """What :func:`encode_rows` gave, as ``[n, num_columns]`` of ``dtype``."""
    kind = TORCH_DTYPES[dtype]
    if encoding is TableEncoding.PLAIN:
        return stored.view(kind)
    num_rows = len(stored)
    q_bytes = num_columns if encoding is TableEncoding.INT8 else num_columns // 2
    scales = stored[:, q_bytes:].contiguous().view(torch.float16).float()
    packed = stored[:, :q_bytes]
    if encoding is TableEncoding.INT8:
        q = packed.contiguous().view(torch.int8).float()
    else:
        q = torch.stack((packed & 15, packed >> 4), dim=2).view(num_rows, num_columns).float() - 8
    groups = q.view(num_rows, -1, group_size(num_columns))
    return (groups * scales[:, :, None]).view(num_rows, num_columns).to(kind)
