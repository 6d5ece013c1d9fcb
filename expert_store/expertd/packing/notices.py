"""What a packing tells its user of the checkpoint, in sentences."""

from collections.abc import Callable, Iterator, Sequence

from expertd.packing.checkpoint import Checkpoint
from expertd.packing.gguf.losses import losses
from expertd.packing.schemes import Scheme
from expertstore.errors import CheckpointError
from expertstore.pack.seeing import PROCESSOR_FILES, SEEING, has_processor
from expertstore.sizes import format_bytes

MOST_TOLD = 20
"""Tensors that are not finite and are named, of those that were forced."""
ADAPTER_NAME = "adapter_config.json"


def peculiarities(checkpoint: Checkpoint, scheme: Scheme) -> Iterator[str]:
    """What the user is to know of the checkpoint, in sentences."""
    architecture = checkpoint.architecture
    if architecture.sees:
        yield (
            f"{architecture.name} sees: its vision part is packed as well "
            f"({format_bytes(checkpoint.vision_bytes)}); --text-only leaves it out."
        )
    elif architecture.model_type in SEEING and not has_processor(checkpoint.path):
        yield (
            f"{checkpoint.path} has no {PROCESSOR_FILES[0]}, without which images cannot be "
            "prepared: it is packed as a model of text only."
        )
    if checkpoint.unused:
        yield (
            f"{len(checkpoint.unused)} tensors that {checkpoint.architecture.name} has no "
            f"place for are left out, such as {checkpoint.unused[0]}."
        )
    if checkpoint.unfilled:
        yield (
            f"{checkpoint.path} lacks {len(checkpoint.unfilled)} buffers, such as "
            f"{checkpoint.unfilled[0]}, which stay as transformers makes them."
        )
    if (checkpoint.path / ADAPTER_NAME).exists():
        yield (
            f"{checkpoint.path} has an adapter as well ({ADAPTER_NAME}), which is left out: merge "
            "it first if it is to have an effect."
        )
    if checkpoint.disagrees:
        found = f"are in {checkpoint.stored_as}" if checkpoint.stored_as else "are not quantized"
        yield (
            f"The config.json of {checkpoint.path} names a quantization ({checkpoint.disagrees}), "
            f"and its weights {found}: they are packed as what they are."
        )
    if len(checkpoint.types) > 1:
        yield (
            f"The experts come in {', '.join(sorted(checkpoint.types))}: what of them is not "
            f"quantized is written as {checkpoint.dtype}, which has the range of all."
        )
    if scheme.experts.is_kept:
        yield from losses(checkpoint)
    if (kinds := checkpoint.kept_kinds()) and not scheme.experts.is_kept:
        yield (
            f"The experts come in {kinds}, and are made {scheme.experts} of that; --experts as-is "
            "keeps them as they are."
        )


class Flawed:
    """Tells of weights that are not finite: refuses them, or names them as they come."""

    def __init__(self, force: bool, notice: Callable[[str], None]) -> None:
        self._force = force
        self._notice = notice
        self._num_told = 0
        self._num_more = 0

    def meet(self, flaws: Sequence[str]) -> None:
        """Raises :class:`CheckpointError` unless forced."""
        if not self._force:
            more = f", and {len(flaws) - 1} more tensors have flaws" if len(flaws) > 1 else ""
            raise CheckpointError(
                f"{flaws[0]}{more}; mend the checkpoint, or give --force to pack it as it is."
            )
        for flaw in flaws:
            if self._num_told < MOST_TOLD:
                self._num_told += 1
                self._notice(f"{flaw}; it is packed so (--force).")
            else:
                self._num_more += 1

    def conclude(self) -> None:
        """Says how many were not named."""
        if self._num_more:
            self._notice(f"{self._num_more} more tensors are not finite, and packed so (--force).")
