"""The trunk of a pack as a state dict that reads a tensor when it is asked for.

transformers slices each value of a state dict with ``[...]`` when it needs it. Tensors that
are stored as they are come straight from the mapped file, whose pages all workers share;
quantized ones are dequantized one at a time.
"""

from pathlib import Path
from types import EllipsisType
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor

from expertd.errors import PackError
from expertd.pack.manifest import Manifest, QuantizedTensor
from expertd.packing.codec import TORCH_DTYPES, dequantize


class QuantizedSlice:
    """A quantized matrix of the trunk; acts as safetensors' slice of a plain one."""

    def __init__(self, file: Any, tensor: QuantizedTensor, names: frozenset[str]) -> None:  # noqa: ANN401
        self._file = file
        self._tensor = tensor
        self._names = names

    def get_dtype(self) -> str:
        """The dtype of the matrix before it was quantized, in safetensors' names."""
        return self._tensor.dtype

    def get_shape(self) -> list[int]:
        """[out, in]."""
        return [self._tensor.matrix.out_features, self._tensor.matrix.in_features]

    def __getitem__(self, index: EllipsisType) -> Tensor:
        parts = {name: self._file.get_tensor(name) for name in self._names}
        return dequantize(self._tensor.matrix, parts, TORCH_DTYPES[self._tensor.dtype])


def trunk_state(pack: Path, manifest: Manifest) -> dict[str, Any]:
    """The trunk's tensors by the checkpoint's names; values are sliced with ``[...]``.

    Raises PackError if the file is missing, damaged, or lacks a tensor of the manifest.
    """
    path = pack / manifest.trunk.name
    try:
        if path.stat().st_size != manifest.trunk.num_bytes:
            raise PackError(f"{path} does not have its full size; copy or make the pack again.")
        file: Any = safe_open(path, framework="pt")
        names = frozenset(file.keys())
    except (OSError, SafetensorError) as error:
        raise PackError(f"{path} cannot be read: {error}.") from error
    state: dict[str, Any] = {}
    stored = set(names)
    for tensor in manifest.trunk_quantized:
        parts = frozenset(name for name in names if name.startswith(f"{tensor.name}."))
        if not parts:
            raise PackError(f"{path} lacks {tensor.name}; make the pack again.")
        stored -= parts
        state[tensor.name] = QuantizedSlice(file, tensor, parts)
    for name in stored:
        state[name] = file.get_slice(name)
    return state
