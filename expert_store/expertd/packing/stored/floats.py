"""Stored weights whose values are small floats, by their headers."""

from expertd.packing.checkpoint_files import CheckpointTensor
from expertd.packing.schemes import MXFP4, MXFP8, NVFP4
from expertd.packing.stored.pieces import Pieces
from expertd.packing.stored.weight import Form, Packing, StoredWeight, fp8_form
from expertstore.errors import CheckpointError
from expertstore.pack.layout import MXFP4_GROUP_SIZE

FP8 = "F8_E4M3"
EXPONENTS = {"U8", "F8_E8M0"}
"""Types of scales that are powers of two."""
_HALVES = {"U8", "I8", "F4"}
"""Types that nibbles come in; F4 counts them one by one."""
_USUAL_BLOCK = (128, 128)


def find_blocks(pieces: Pieces, tensor: CheckpointTensor) -> StoredWeight | None:
    """GPT-OSS: ``X_blocks`` and ``X_scales``."""
    name = tensor.name
    if name.endswith("_scales") and tensor.entry.dtype == "U8":
        pieces.need(f"{name.removesuffix('_scales')}_blocks")
    if not name.endswith("_blocks") or tensor.entry.dtype != "U8":
        return None
    stem = name.removesuffix("_blocks")
    scales = pieces.need(f"{stem}_scales")
    *outer, rows, groups, _ = tensor.entry.shape
    pieces.check(tensor, (*outer, rows, groups, MXFP4_GROUP_SIZE // 2), scales)
    pieces.check(scales, (*outer, rows, groups), tensor)
    return StoredWeight(
        stem,
        (*outer, groups * MXFP4_GROUP_SIZE, rows),
        Packing.MXFP4_BLOCKS,
        {"blocks": tensor, "scales": scales},
        Form(MXFP4),
        head={"blocks": 1, "scales": 1},
        is_transposed=True,
    )


def find_nibbles(pieces: Pieces, tensor: CheckpointTensor) -> StoredWeight | None:
    """``X.weight_packed`` and ``X.weight_scale`` of compressed-tensors, or ``X.weight`` itself.

    ModelOpt has the latter in NVFP4, and DeepSeek V4 with ``X.scale`` in MXFP4.
    """
    name = tensor.name
    if tensor.entry.dtype not in _HALVES or len(tensor.entry.shape) < 2:
        return None
    stem = name.removesuffix("_packed")
    scales = pieces.get(f"{stem}_scale", f"{stem.removesuffix('weight')}scale")
    if name.endswith(".weight_packed"):
        scales = pieces.need(f"{stem}_scale")
    if scales is None or scales.entry.dtype not in {*EXPONENTS, FP8}:
        return None
    is_nvidias = scales.entry.dtype == FP8
    precision = NVFP4 if is_nvidias else MXFP4
    *outer, rows, width = tensor.entry.shape
    columns = width if tensor.entry.dtype == "F4" else 2 * width
    pieces.check(scales, (*outer, rows, -(-columns // precision.group_size)), tensor)
    found = {"packed": tensor, "scales": scales}
    packing = Packing.MXFP4
    if is_nvidias:
        divisor = pieces.get(f"{stem}_global_scale")
        packing = Packing.NVFP4 if divisor is None else Packing.NVFP4_DIVISOR
        found["global"] = divisor or pieces.need(f"{stem}_scale_2")
        if found["global"].entry.shape not in {(), (1,), (*outer,), (*outer, 1), (*outer, 1, 1)}:
            pieces.check(found["global"], (*outer, 1), tensor)
    head = {"packed": 32, "scales": 32, "global": 1}
    return StoredWeight(stem, (*outer, rows, columns), packing, found, Form(precision), head=head)


def find_fp8(pieces: Pieces, tensor: CheckpointTensor) -> StoredWeight | None:
    """``X.weight`` with ``X.weight_scale_inv``, ``X.weight_scale`` or ``X.scale``."""
    name, shape = tensor.name, tensor.entry.shape
    if tensor.entry.dtype != FP8 or len(shape) < 2 or name.endswith("_scale"):
        return None
    stem = name.removesuffix("weight")
    scales = pieces.need(f"{name}_scale_inv", f"{name}_scale", f"{stem}scale")
    block = _block(pieces, tensor, scales)
    found = {"weight": tensor, "scales": scales}
    head = {"weight": min(block[0], _USUAL_BLOCK[0]), "scales": 1}
    if block == (1, MXFP8.group_size) and scales.entry.dtype in EXPONENTS:
        return StoredWeight(name, shape, Packing.MXFP8, found, Form(MXFP8), head=head)
    return StoredWeight(name, shape, Packing.FP8, found, fp8_form(block), head=head)


def _block(pieces: Pieces, weight: CheckpointTensor, scales: CheckpointTensor) -> tuple[int, int]:
    """Rows and columns that share a scale. Raises :class:`CheckpointError`."""
    *outer, rows, columns = weight.entry.shape
    found = scales.entry.shape
    known = pieces.description.block(weight.name.removesuffix(".weight"))
    candidates = [*([known] if known else []), _USUAL_BLOCK, (1, columns), (rows, columns)]
    if scales.entry.dtype in EXPONENTS:
        candidates.append((1, MXFP8.group_size))
    for height, width in candidates:
        if found == (*outer, -(-rows // height), -(-columns // width)):
            return height, width
    if found in {(), (1,), (*outer,), (*outer, 1)}:
        return rows, columns
    if found == (*outer, rows):
        return 1, columns
    height, width = known or _USUAL_BLOCK
    raise CheckpointError(
        f"{scales.file} has {scales.name} in the shape {list(found)} for a weight of "
        f"{list(weight.entry.shape)}, which blocks of {height} x {width} do not give; mend "
        "weight_block_size in config.json, or download the checkpoint again."
    )
