"""The scheme for a user who names none."""

from pathlib import Path

from expertd.packing.checkpoint_files import find_tensors, read_config
from expertd.packing.gguf.names import gguf_of
from expertd.packing.schemes import AS_IS
from expertd.packing.stored.description import read_description
from expertd.packing.stored.finding import find_stored
from expertstore.errors import CheckpointError


def default_scheme(checkpoint: Path) -> str:
    """Its name: what is quantized already is left as it is.

    Whether ``checkpoint`` is one at all is for others to say.
    """
    try:
        if (file := gguf_of(checkpoint)) is not None:
            from expertd.packing.gguf.model_file import read_model
            from expertd.packing.gguf.types import precision_of

            types = {tensor.type for tensor in read_model(file).tensors.values()}
            return str(AS_IS) if any(precision_of(kind).bits for kind in types) else "4bit"
        config = read_config(checkpoint)
        _, stored = find_stored(
            checkpoint, find_tensors(checkpoint, config), read_description(checkpoint, config)
        )
    except CheckpointError:
        return "4bit"
    # Not what its configuration says: fine-tuning makes 16-bit experts and leaves that as it was.
    return str(AS_IS) if stored else "4bit"
