"""The trunk of a pack, a tensor at a time.

transformers slices each value of a state dict with ``[...]`` when it needs it. Tensors that
are stored as they are come straight from the mapped file, and so do the parts of quantized
ones; where no kernel computes from these, they are dequantized one at a time.
"""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import EllipsisType, TracebackType
from typing import Any, Self

from safetensors import SafetensorError, safe_open
from torch import Tensor

from expertstore.errors import PackError
from expertstore.pack.codec import TORCH_DTYPES, dequantize
from expertstore.pack.layout import matrix_parts
from expertstore.pack.manifest import Manifest, QuantizedTensor
from expertstore.pack.verify import check_trunk


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


class TrunkFile:
    """The open trunk of a pack. Its tensors lie in the mapped file, whose pages all workers share.

    ``names`` are the checkpoint's names of all tensors, quantized ones included.
    """

    def __init__(self, pack: Path, manifest: Manifest) -> None:
        """Raises PackError if the file is missing, damaged, or lacks a tensor of the manifest."""
        path = pack / manifest.trunk.name
        try:
            if path.stat().st_size != manifest.trunk.num_bytes:
                raise PackError(f"{path} does not have its full size; copy or make the pack again.")
            file: Any = safe_open(path, framework="pt")
            stored = frozenset(file.keys())
        except (OSError, SafetensorError) as error:
            raise PackError(f"{path} cannot be read: {error}.") from error
        self._file = file
        self._quantized: dict[str, tuple[QuantizedTensor, frozenset[str]]] = {}
        plain = set(stored)
        for tensor in manifest.trunk_quantized:
            parts = {name for name, *_ in matrix_parts(tensor.matrix, tensor.dtype)}
            if not parts <= stored:
                raise PackError(f"{path} lacks {min(parts - stored)}; make the pack again.")
            plain -= parts
            self._quantized[tensor.name] = tensor, frozenset(parts)
        self._plain = frozenset(plain)

    @property
    def names(self) -> frozenset[str]:
        """The checkpoint's names."""
        return self._plain | self._quantized.keys()

    def state(self, *, dequantized: bool) -> dict[str, Any]:
        """A state dict whose values are sliced with ``[...]``, of the plain tensors.

        With ``dequantized`` the quantized ones are in it too, as if they were plain.
        """
        state = {name: self._file.get_slice(name) for name in self._plain}
        if dequantized:
            for name, (tensor, parts) in self._quantized.items():
                state[name] = QuantizedSlice(self._file, tensor, parts)
        return state

    def parts(self, name: str) -> dict[str, Tensor]:
        """The parts of the quantized matrix ``name``, in the mapped file."""
        return {part: self._file.get_tensor(part) for part in self._quantized[name][1]}


class TrunkCheck:
    """Reads the trunk's file in a thread, and holds it against its checksum; a context manager.

    Whoever is interrupted before :meth:`finish` does not wait for the rest of the file.
    """

    def __init__(self, pack: Path, manifest: Manifest) -> None:
        self._pack = pack
        self._given_up = threading.Event()
        self._thread = ThreadPoolExecutor(1, "trunk-check")
        self._damages = self._thread.submit(check_trunk, pack, manifest, self._go_on)

    def finish(self) -> None:
        """Waits for the end. Raises PackError if the file has not the bytes that were packed."""
        for damage in self._damages.result():
            raise PackError(
                f"{self._pack / damage.file} is damaged: {damage.reason}; copy or make the pack "
                "again (`expertd verify` tells what else is wrong)."
            )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exc_type: type[BaseException] | None,
        exc: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._given_up.set()
        self._thread.shutdown()

    def _go_on(self, _: int) -> None:
        if self._given_up.is_set():
            raise InterruptedError
