"""A checkpoint's configuration, and which tensors its files hold, by their headers; no torch.

The files are those that transformers would load: ``model.safetensors`` if it is there, else the
shards that ``model.safetensors.index.json`` names, and all tensors in these; the index does not
decide which shard a tensor is read from. A file that ``config.json`` names itself
(``transformers_weights``) goes before both.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import fsencode
from pathlib import Path
from stat import S_ISREG
from typing import Any

import msgspec
import xxhash

from expertd.packing.missing_files import why_no_weights, why_not_there
from expertstore.errors import CheckpointError
from expertstore.pack.tensor_file import TensorEntry, read_header

CONFIG_NAME = "config.json"
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
EXPLICIT_KEY = "transformers_weights"
"""What in ``config.json`` names the file of weights, or its index."""


@dataclass(frozen=True)
class CheckpointTensor:
    """A tensor of the checkpoint: where it is, and the file it is in."""

    file: Path
    entry: TensorEntry

    @property
    def name(self) -> str:
        """The checkpoint's name of it."""
        return self.entry.name


@dataclass(frozen=True)
class Listing:
    """All tensors of a checkpoint."""

    tensors: list[CheckpointTensor]
    absent: frozenset[str] = frozenset()
    """Names in the index that no file holds; transformers asks for them only if a model does."""


def read_config(path: Path) -> dict[str, Any]:
    """The ``config.json`` of a checkpoint's directory. Raises CheckpointError if it has none."""
    file = path / CONFIG_NAME
    try:
        if not path.is_dir():
            raise CheckpointError(f"{path} is not a directory; give the checkpoint's directory.")
        found = read_json(file)
    except FileNotFoundError as error:
        raise CheckpointError(
            why_not_there(file) or f"{path} is not a checkpoint: it has no {CONFIG_NAME}."
        ) from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if not isinstance(found, dict):
        raise CheckpointError(f"{file} is damaged (it holds no object); download it again.")
    return found


def read_json(file: Path) -> Any:  # noqa: ANN401 - what JSON holds
    """What ``file`` holds, as Python reads JSON: NaN and Infinity are numbers in it.

    Raises FileNotFoundError, and :class:`CheckpointError` if it cannot be read.
    """
    try:
        if not S_ISREG(file.stat().st_mode):  # reading a FIFO would wait for ever
            raise CheckpointError(f"{file} is not a regular file; put the checkpoint's there.")
        return json.loads(file.read_bytes().decode())
    except FileNotFoundError:
        raise
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file} is damaged ({error}); download it again.") from error


def quantization_method(config: Mapping[str, Any]) -> str:
    """How the checkpoint of that configuration is quantized already; empty if it is not."""
    quantization = config.get("quantization_config")
    if not quantization:
        return "MLX" if config.get("quantization") else ""
    named = isinstance(quantization, dict) and quantization.get("quant_method")
    return str(named or "an unnamed format")


def find_tensors(path: Path, config: Mapping[str, Any]) -> Listing:
    """All tensors that transformers would load. Raises :class:`CheckpointError`."""
    try:
        main = _main_file(path, config)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror}.") from error
    if not main.name.endswith(".index.json"):
        return Listing(list(_read_headers(path, [main]).values()))
    try:
        weight_map = msgspec.convert(read_json(main), _Index).weight_map
    except (OSError, msgspec.ValidationError) as error:
        raise CheckpointError(f"{main} is damaged ({error}); download it again.") from error
    if not weight_map:
        raise CheckpointError(f"{main} names no tensors; download it again.")
    tensors = _read_headers(path, [path / name for name in sorted(set(weight_map.values()))])
    return Listing(list(tensors.values()), frozenset(weight_map) - tensors.keys())


class _Index(msgspec.Struct):
    weight_map: dict[str, str]


def _main_file(path: Path, config: Mapping[str, Any]) -> Path:
    """The file of weights, or the index."""
    explicit = config.get(EXPLICIT_KEY)
    if explicit is not None:
        file = path / str(explicit)
        if not str(explicit).endswith((".safetensors", ".safetensors.index.json")):
            raise CheckpointError(
                f"{path / CONFIG_NAME} names {explicit} as the weights ({EXPLICIT_KEY}), which is "
                "neither a safetensors file nor an index of some; name one that is."
            )
        if not file.is_file():
            raise CheckpointError(
                why_not_there(file)
                or f"{path} lacks {explicit}, which its {CONFIG_NAME} names ({EXPLICIT_KEY}); "
                "download it."
            )
        return file
    for name in (SINGLE_NAME, INDEX_NAME):
        if (path / name).is_file():
            return path / name
    raise CheckpointError(why_no_weights(path, SINGLE_NAME, INDEX_NAME))


def _read_headers(path: Path, files: Sequence[Path]) -> dict[str, CheckpointTensor]:
    """The tensors of ``files``; of one that two of them hold, the later's, as in transformers."""
    tensors: dict[str, CheckpointTensor] = {}
    for file in files:
        try:
            stat = file.stat()
            if not S_ISREG(stat.st_mode):
                raise ValueError("it is not a regular file")
            entries, num_bytes = read_header(file), stat.st_size
        except FileNotFoundError as error:
            raise CheckpointError(
                why_not_there(file) or f"{path} lacks {file}, which its index names; download it."
            ) from error
        except OSError as error:
            raise CheckpointError(f"{file} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise CheckpointError(f"{file} cannot be used: {error}; download it again.") from error
        end = max((entry.offset + entry.num_bytes for entry in entries.values()), default=0)
        if num_bytes < end:
            raise CheckpointError(
                f"{file} is truncated: it has {num_bytes} of {end} bytes; download it again."
            )
        tensors |= {name: CheckpointTensor(file, entry) for name, entry in entries.items()}
    return tensors


def check_shape(tensor: CheckpointTensor, shape: tuple[int, ...]) -> None:
    """Raises :class:`CheckpointError` unless ``tensor`` has that shape."""
    if tensor.entry.shape != shape:
        raise CheckpointError(
            f"{tensor.file} has {tensor.name} in the shape {list(tensor.entry.shape)}, and its "
            f"config.json asks for {list(shape)}; download the checkpoint again."
        )


def fingerprint(path: Path, tensors: Sequence[CheckpointTensor]) -> str:
    """Changes when the configuration, or the size, time or header of a weight file does."""
    state = xxhash.xxh3_64((path / CONFIG_NAME).read_bytes())
    for file in sorted({tensor.file for tensor in tensors}):
        stat = file.stat()
        state.update(fsencode(file.name) + f" {stat.st_size} {stat.st_mtime_ns}".encode())
    state.update(msgspec.json.encode([tensor.entry for tensor in tensors]))
    return state.hexdigest()
