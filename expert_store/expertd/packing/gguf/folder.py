"""A GGUF file as a checkpoint's directory: configuration and tokenizer made, weights linked."""

import json
from pathlib import Path

from expertd.packing.checkpoint_files import CONFIG_NAME
from expertd.packing.gguf.configs import make_config
from expertd.packing.gguf.model_file import read_model
from expertd.packing.gguf.tokenizer import special_tokens


def unfold(file: Path, folder: Path) -> None:
    """Makes ``folder`` the checkpoint that the GGUF ``file`` is, without its tokenizer.

    Raises :class:`CheckpointError` if the model is not read.
    """
    model = read_model(file)
    config = {**make_config(model), **special_tokens(model), "dtype": "bfloat16"}
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.iterdir():
        old.unlink()
    for part in model.files:
        (folder / part.name).symlink_to(part.absolute())
    (folder / CONFIG_NAME).write_text(json.dumps(config, indent=1) + "\n")
