"""What is in a pack, in numbers."""

import math
from dataclasses import dataclass
from pathlib import Path

from expertstore.errors import PackError
from expertstore.pack.manifest import Fingerprinted, Manifest, RecordLayout, read_manifest
from expertstore.pack.tensor_file import TensorEntry, read_header


@dataclass(frozen=True)
class Inspection:
    """A pack's manifest, and what follows from it."""

    pack: Fingerprinted
    expert_weights: int
    trunk_weights: int
    trunk_plain: tuple[TensorEntry, ...]
    """The trunk's matrices that are not quantized, the largest first."""

    @property
    def manifest(self) -> Manifest:
        """The pack's."""
        return self.pack.manifest

    @property
    def expert_bits(self) -> float:
        """Bits per expert weight: scales, zeros, biases and padding included."""
        return 8 * self.manifest.expert_bytes / self.expert_weights

    @property
    def trunk_bits(self) -> float:
        """Bits per weight of the trunk, all included."""
        return 8 * self.manifest.trunk.num_bytes / self.trunk_weights


def inspect(pack: Path) -> Inspection:
    """Reads the manifest and the trunk's header. Raises :class:`PackError`."""
    found = read_manifest(pack)
    manifest = found.manifest
    path = pack / manifest.trunk.name
    try:
        tensors = read_header(path)
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise PackError(f"{path} cannot be used: {error}; copy or make the pack again.") from error
    prefixes = tuple(f"{tensor.name}." for tensor in manifest.trunk_quantized)
    plain = [tensor for name, tensor in tensors.items() if not name.startswith(prefixes)]
    trunk_weights = sum(math.prod(tensor.shape) for tensor in plain) + sum(
        tensor.matrix.out_features * tensor.matrix.in_features
        for tensor in manifest.trunk_quantized
    )
    expert_weights = sum(
        layer.num_experts * num_weights(manifest.layouts[layer.layout]) for layer in manifest.layers
    )
    matrices = sorted(
        (tensor for tensor in plain if len(tensor.shape) > 1),
        key=lambda tensor: (-tensor.num_bytes, tensor.name),
    )
    return Inspection(found, expert_weights, trunk_weights, tuple(matrices))


def num_weights(layout: RecordLayout) -> int:
    """The weights in one record, biases aside."""
    return sum(matrix.out_features * matrix.in_features for matrix in layout.matrices)
