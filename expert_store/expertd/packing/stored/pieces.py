"""The tensors of a checkpoint by name, looked through for the pieces of stored weights."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from expertd.packing.checkpoint_files import CheckpointTensor
from expertd.packing.stored.description import Description
from expertstore.errors import CheckpointError


@dataclass(frozen=True)
class Pieces:
    """All tensors, and what the configuration says of them."""

    path: Path
    tensors: Mapping[str, CheckpointTensor]
    description: Description

    def get(self, *names: str) -> CheckpointTensor | None:
        """The first of ``names`` that is there."""
        return next((self.tensors[name] for name in names if name in self.tensors), None)

    def need(self, *names: str) -> CheckpointTensor:
        """The same. Raises :class:`CheckpointError` if none of them is there."""
        found = self.get(*names)
        if found is None:
            raise CheckpointError(f"{self.path} lacks {names[0]}; download the checkpoint again.")
        return found

    @staticmethod
    def check(
        tensor: CheckpointTensor, shape: tuple[int, ...], beside: CheckpointTensor
    ) -> CheckpointTensor:
        """``tensor``. Raises :class:`CheckpointError` if its shape is not what the other needs."""
        if tensor.entry.shape != shape:
            raise CheckpointError(
                f"{tensor.file} has {tensor.name} in the shape {list(tensor.entry.shape)}, and "
                f"{beside.name} needs {list(shape)}; download the checkpoint again."
            )
        return tensor
