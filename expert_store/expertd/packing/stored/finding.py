"""Which tensors of a checkpoint are pieces of stored weights, by their names, types and shapes.

What the tensors are decides; ``config.json`` is asked for what they do not tell.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from expertd.packing.checkpoint_files import CheckpointTensor, Listing
from expertd.packing.schemes import MXFP4
from expertd.packing.stored.description import Description
from expertd.packing.stored.weight import PLAIN_FORM, Form, Packing, StoredWeight
from expertstore.errors import CheckpointError
from expertstore.pack.layout import MXFP4_GROUP_SIZE

FP8 = "F8_E4M3"
_FP8_SCALES = ("_scale_inv", "_scale")
_USUAL_BLOCK = (128, 128)
_OF_ACTIVATIONS = (".input_scale", ".input_global_scale")
"""Ends of the names of tensors beside a stored weight that no worker uses."""
_FACTORS = {"F32", "BF16", "F16"}


def find_stored(
    path: Path, listing: Listing, description: Description
) -> tuple[Listing, dict[str, StoredWeight]]:
    """``listing`` with each stored weight as one tensor, and these by their names.

    Raises :class:`CheckpointError` if a piece of one is missing, or of another shape.
    """
    finder = _Finder(path, {tensor.name: tensor for tensor in listing.tensors}, description)
    found = {weight.name: weight for weight in finder.weights()}
    pieces = {piece.name for weight in found.values() for piece in weight.pieces.values()}
    stems = {name.removesuffix(".weight") for name in found}
    dropped = {f"{stem}{end}" for stem in stems for end in _OF_ACTIVATIONS}
    tensors = [
        tensor
        for tensor in listing.tensors
        if tensor.name not in pieces and tensor.name not in dropped
    ]
    tensors += [weight.tensor for weight in found.values()]
    return replace(listing, tensors=tensors), found


@dataclass(frozen=True)
class _Finder:
    path: Path
    tensors: Mapping[str, CheckpointTensor]
    description: Description

    def weights(self) -> Iterator[StoredWeight]:
        for tensor in self.tensors.values():
            if (weight := self._of(tensor)) is not None:
                yield weight

    def _of(self, tensor: CheckpointTensor) -> StoredWeight | None:
        """The weight that ``tensor`` is the main piece of."""
        name, dtype = tensor.name, tensor.entry.dtype
        if name.endswith("_blocks") and dtype == "U8":
            return self._mxfp4_blocks(tensor)
        if name.endswith("_scales") and dtype == "U8":
            self._need(f"{name.removesuffix('_scales')}_blocks")
        if dtype == FP8 and len(tensor.entry.shape) >= 2:
            return self._fp8(tensor)
        return None

    def _mxfp4_blocks(self, blocks: CheckpointTensor) -> StoredWeight:
        stem = blocks.name.removesuffix("_blocks")
        scales = self._need(f"{stem}_scales")
        *outer, rows, groups, _ = blocks.entry.shape
        self._check(blocks, (*outer, rows, groups, MXFP4_GROUP_SIZE // 2), scales)
        self._check(scales, (*outer, rows, groups), blocks)
        return StoredWeight(
            stem,
            (*outer, groups * MXFP4_GROUP_SIZE, rows),
            Packing.MXFP4_BLOCKS,
            {"blocks": blocks, "scales": scales},
            Form(MXFP4),
            head={"blocks": 1, "scales": 1},
            is_transposed=True,
        )

    def _fp8(self, weight: CheckpointTensor) -> StoredWeight:
        names = [f"{weight.name}{end}" for end in _FP8_SCALES]
        names.append(f"{weight.name.removesuffix('weight')}scale")
        scales = next((self.tensors[name] for name in names if name in self.tensors), None)
        if scales is None:
            raise self._lacks(names[0])
        block = self._block(weight, scales)
        return StoredWeight(
            weight.name,
            weight.entry.shape,
            Packing.FP8,
            {"weight": weight, "scales": scales},
            PLAIN_FORM,
            head={"weight": min(block[0], _USUAL_BLOCK[0]), "scales": 1},
            block=block,
        )

    def _block(self, weight: CheckpointTensor, scales: CheckpointTensor) -> tuple[int, int]:
        """Rows and columns that share a scale."""
        *outer, rows, columns = weight.entry.shape
        found = scales.entry.shape
        known = self.description.block
        candidates = [
            *([known] if known else []), _USUAL_BLOCK, (1, columns), (rows, columns),
        ]  # fmt: skip
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

    def _need(self, name: str) -> CheckpointTensor:
        if name not in self.tensors:
            raise self._lacks(name)
        return self.tensors[name]

    def _lacks(self, name: str) -> CheckpointError:
        return CheckpointError(f"{self.path} lacks {name}; download the checkpoint again.")

    def _check(
        self, tensor: CheckpointTensor, shape: tuple[int, ...], beside: CheckpointTensor
    ) -> None:
        if tensor.entry.shape != shape:
            raise CheckpointError(
                f"{tensor.file} has {tensor.name} in the shape {list(tensor.entry.shape)}, and "
                f"{beside.name} needs {list(shape)}; download the checkpoint again."
            )
