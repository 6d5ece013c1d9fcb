"""A GGUF file as a checkpoint's directory: configuration and tokenizer made, weights linked."""

import json
from pathlib import Path

from expertd.packing.checkpoint_files import CONFIG_NAME, INDEX_NAME, SINGLE_NAME
from expertd.packing.gguf.configs import make_config
from expertd.packing.gguf.model_file import SUFFIX, is_gguf, model_name, read_model
from expertd.packing.gguf.tokenizer import special_tokens
from expertstore.errors import CheckpointError

_VISION = "mmproj"
"""Begins or ends the names of files that hold the part that sees."""


def gguf_of(path: Path) -> Path | None:
    """The GGUF file that ``path`` is, or that is the model in the directory ``path``.

    None if it is neither: a directory with safetensors is those. Raises :class:`CheckpointError`
    if the directory has several models.
    """
    if is_gguf(path) and not path.is_dir():
        return path
    if not path.is_dir() or any((path / name).exists() for name in (SINGLE_NAME, INDEX_NAME)):
        return None
    files = sorted(file for file in path.glob(f"*{SUFFIX}") if _VISION not in file.name.lower())
    models = {model_name(file): file for file in reversed(files)}
    if len(models) > 1:
        raise CheckpointError(
            f"{path} has several models in GGUF ({', '.join(sorted(models))}); give the file of "
            "one."
        )
    return next(iter(models.values()), None)


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
