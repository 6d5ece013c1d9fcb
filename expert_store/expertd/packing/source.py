"""A checkpoint's configuration, and which tensors its files hold, by their headers; no torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec
import xxhash

from expertd.errors import CheckpointError
from expertd.pack.tensor_file import TensorEntry, read_header

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


@dataclass(frozen=True)
class SourceTensor:
    """A tensor of the checkpoint: where it is, and the file it is in."""

    file: Path
    entry: TensorEntry

    @property
    def name(self) -> str:
        """The checkpoint's name of it."""
        return self.entry.name


def read_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint's directory. Raises CheckpointError if it has none."""
    if not path.is_dir():
        raise CheckpointError(f"{path} is not a directory; give the checkpoint's directory.")
    file = path / CONFIG_NAME
    try:
        return msgspec.json.decode(file.read_bytes(), type=dict[str, Any])
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} is not a checkpoint: it has no {CONFIG_NAME}.") from error
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    except (msgspec.MsgspecError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); download it again.") from error


def quantization_method(config: Mapping[str, Any]) -> str:
    """How the checkpoint of that configuration is quantized already; empty if it is not."""
    quantization = config.get("quantization_config")
    if not quantization:
        return ""
    named = isinstance(quantization, dict) and quantization.get("quant_method")
    return str(named or "an unnamed format")


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def find_tensors(path: Path) -> list[SourceTensor]:
    """All tensors of the checkpoint. Raises :class:`CheckpointError`."""
    index = path / INDEX_NAME
    weight_map: dict[str, str] | None = None
    if index.exists():
        try:
            weight_map = msgspec.json.decode(index.read_bytes(), type=_Index).weight_map
        except (OSError, msgspec.MsgspecError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{index} is damaged ({error}); download it again.") from error
        files = [path / name for name in sorted(set(weight_map.values()))]
    elif (path / SINGLE_NAME).exists():
        files = [path / SINGLE_NAME]
    else:
        raise CheckpointError(
            f"{path} is not a checkpoint: it has no {SINGLE_NAME} and no {INDEX_NAME}; convert "
            "other formats to safetensors first."
        )
    tensors: dict[str, SourceTensor] = {}
    for file in files:
        try:
            for name, entry in read_header(file).items():
                if weight_map is None or weight_map.get(name) == file.name:
                    tensors[name] = SourceTensor(file, entry)
        except FileNotFoundError as error:
            raise CheckpointError(
                f"{path} lacks {file.name}, which its index names; download it again."
            ) from error
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise CheckpointError(f"{file} cannot be used: {error}; download it again.") from error
    absent = sorted(set(weight_map or ()) - set(tensors))
    if absent:
        raise CheckpointError(
            f"{path} lacks the tensor {absent[0]}, which its index names; download it again."
        )
    return list(tensors.values())


def fingerprint(path: Path, tensors: Sequence[SourceTensor]) -> str:
    """Changes when the configuration, or the size, time or header of a weight file does."""
    state = xxhash.xxh3_64((path / CONFIG_NAME).read_bytes())
    for file in sorted({tensor.file for tensor in tensors}):
        stat = file.stat()
        state.update(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode())
    state.update(msgspec.json.encode([tensor.entry for tensor in tensors]))
    return state.hexdigest()
