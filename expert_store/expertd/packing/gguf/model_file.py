"""A model in GGUF: one file, or the parts into which it was split."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from expertd.packing.gguf.header import GgufHeader, GgufTensor, Value, read_header
from expertd.packing.gguf.names import part_names
from expertstore.errors import CheckpointError

T = TypeVar("T", int, float, bool, str)


@dataclass(frozen=True)
class GgufModel:
    """What all parts say together. ``file`` is the first of them."""

    file: Path
    files: tuple[Path, ...]
    metadata: Mapping[str, Value]
    tensors: Mapping[str, GgufTensor]

    @property
    def architecture(self) -> str:
        """llama.cpp's name of it; empty if the file has none."""
        return self.text("general.architecture")

    def text(self, key: str) -> str:
        """A text of the metadata; empty if it is not there."""
        return self.get(key, "")

    def get(self, key: str, default: T) -> T:
        """A value of the metadata, of the type of ``default``.

        Raises :class:`CheckpointError` if it has another.
        """
        value = self.metadata.get(key, default)
        if isinstance(default, float) and type(value) is int:
            value = float(value)
        if type(value) is not type(default):
            raise CheckpointError(
                f"{self.file} has {key} of another kind ({str(value)[:32]}); download it again."
            )
        return value

    def number(self, key: str) -> int:
        """A whole number that must be there. Raises :class:`CheckpointError`."""
        if key not in self.metadata:
            raise CheckpointError(f"{self.file} lacks {key}; get a newer file of the model.")
        return self.get(key, 0)


def read_model(file: Path) -> GgufModel:
    """Reads the headers of ``file`` and of its other parts. Raises :class:`CheckpointError`."""
    names = part_names(file.name)
    if not names or file.name not in names:
        raise CheckpointError(f"{file} is named as a part of a model that has no such part.")
    files = [file.with_name(name) for name in names]
    for each in files:
        if not each.is_file():
            raise CheckpointError(
                f"{each} is not there"
                + (f", a part of the model that {file.name} is one of" if files[1:] else "")
                + "; download it."
            )
    headers = [read_header(each) for each in files]
    metadata = headers[0].metadata
    model = GgufModel(files[0], tuple(files), metadata, _join(files, headers))
    count = model.get("split.count", 1)
    if count not in {0, 1} and count != len(files):
        raise CheckpointError(
            f"{files[0]} is one of {count} parts by its metadata, and one of {len(files)} by its "
            "name; give the parts the names that they had."
        )
    total = model.get("split.tensors.count", len(model.tensors))
    if total != len(model.tensors):
        raise CheckpointError(
            f"{files[0]} and its parts have {len(model.tensors)} of {total} tensors; download "
            "them again."
        )
    _check_kind(model)
    return model


def _join(files: list[Path], headers: list[GgufHeader]) -> dict[str, GgufTensor]:
    tensors: dict[str, GgufTensor] = {}
    for file, header in zip(files, headers, strict=True):
        number = header.metadata.get("split.no", files.index(file))
        if number != files.index(file):
            raise CheckpointError(
                f"{file} is part {number} by its metadata (counted from 0), and another by its "
                "name; give the parts the names that they had."
            )
        if twice := tensors.keys() & header.tensors.keys():
            raise CheckpointError(
                f"{file} has {min(twice)[:64]}, and so has another part; download them again."
            )
        tensors |= header.tensors
    return tensors


def _check_kind(model: GgufModel) -> None:
    """Raises :class:`CheckpointError` for what is in GGUF and no language model."""
    kind = model.text("general.type") or "model"
    if model.architecture == "clip" or kind == "mmproj":
        raise CheckpointError(
            f"{model.file} is the part of a model that sees (mmproj); give the file of the "
            "language model."
        )
    if kind == "adapter":
        raise CheckpointError(
            f"{model.file} is an adapter (LoRA) and not a whole model; give the model's file."
        )
    if kind != "model":
        raise CheckpointError(f"{model.file} holds no model ({kind[:32]}); give the model's file.")
    if not model.architecture:
        raise CheckpointError(
            f"{model.file} lacks general.architecture; get a newer file of the model."
        )
