"""What the operator promises and allows one model: minimum, maximum, pinned experts."""

from __future__ import annotations  # for the types that only checkers import

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from expertd.settings.disk_io import DiskIo, parse_disk_io
from expertstore.errors import ConfigError
from expertstore.sizes import format_bytes, parse_bytes

if TYPE_CHECKING:  # the command's --help needs no manifest
    from expertstore.pack.manifest import Manifest

_RANGE = r"(\d{1,7})(?:-(\d{1,7}))?|\*"
_PIN = re.compile(rf"\s*({_RANGE})\s*:\s*({_RANGE})\s*")


@dataclass(frozen=True)
class ModelLimits:
    """Raises :class:`ConfigError` if they make no sense; the pack is another matter.

    ``min_bytes``: other models' needs leave it that much RAM, once it has it. ``max_bytes``: it
    has never more; None: as much as the budget gives. ``pins``: experts that stay resident while
    the model is loaded, each ``LAYER:EXPERT``, where either may be a number, a range ``A-B`` or
    ``*`` for all.
    """

    min_bytes: int = 0
    max_bytes: int | None = None
    pins: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.min_bytes < 0:
            raise ConfigError(f"min is {self.min_bytes} bytes; it must be 0 or more.")
        if self.max_bytes is not None and self.max_bytes <= 0:
            raise ConfigError(f"max is {self.max_bytes} bytes; it must be positive.")
        if self.max_bytes is not None and self.max_bytes < self.min_bytes:
            raise ConfigError(
                f"min is {format_bytes(self.min_bytes)} and max {format_bytes(self.max_bytes)}; "
                "the minimum must not exceed the maximum."
            )
        for pin in self.pins:
            _parse_pin(pin)

    def guarded_bytes(self, manifest: Manifest) -> int:
        """The most that the minimum keeps from other models: it is kept in whole records."""
        if not self.min_bytes:
            return 0
        sizes = {manifest.layouts[layer.layout].record_bytes for layer in manifest.layers}
        largest = max(sizes)
        if len(sizes) == 1:
            guarded = -(-self.min_bytes // largest) * largest
        else:
            guarded = self.min_bytes + largest
        return min(guarded, manifest.expert_bytes)


NO_LIMITS = ModelLimits()


@dataclass(frozen=True)
class ModelConfig:
    """A pack to serve, within which limits, and how it is read."""

    path: Path
    limits: ModelLimits = NO_LIMITS
    disk_io: DiskIo | None = None
    """None: as the others."""

    @classmethod
    def from_toml(cls, name: str, value: Any) -> ModelConfig:  # noqa: ANN401
        """From ``"path"`` or a table of ``path``, ``min``, ``max``, ``pin`` and ``disk_io``.

        Raises :class:`ConfigError`.
        """
        if isinstance(value, str):
            return cls(Path(value).absolute())
        if not isinstance(value, Mapping):
            raise ConfigError(
                f"models.{name} is a {type(value).__name__}; give the pack's path or a table."
            )
        for key in value.keys() - {"path", "min", "max", "pin", "disk_io"}:
            raise ConfigError(
                f"unknown setting models.{name}.{key}; known are path, min, max, pin and disk_io."
            )
        path, pins = value.get("path"), value.get("pin", [])
        if not isinstance(path, str):
            raise ConfigError(f"models.{name} has no path; give that of the pack.")
        if not isinstance(pins, list) or not all(isinstance(pin, str) for pin in pins):
            raise ConfigError(f'models.{name}.pin is {pins!r}; give a list such as ["0:3", "5:*"].')
        try:
            smallest, largest = (_size(value[key]) if key in value else None for key in _SIZES)
            limits = ModelLimits(smallest or 0, largest, tuple(pins))
            disk_io = parse_disk_io(value["disk_io"]) if "disk_io" in value else None
            return cls(Path(path).absolute(), limits, disk_io)
        except (ConfigError, ValueError) as error:
            raise ConfigError(f"models.{name}: {str(error).rstrip('.')}.") from error


_SIZES = ("min", "max")


def pinned_bytes(pins: Sequence[str], manifest: Manifest, model: str) -> int:
    """The size of the records that ``pins`` name. Raises :class:`ConfigError`."""
    sizes = [
        manifest.layouts[layer.layout].record_bytes
        for layer in manifest.layers
        for _ in range(layer.num_experts)
    ]
    return sum(sizes[entry] for entry in pinned_entries(pins, manifest, model))


def pinned_entries(pins: Sequence[str], manifest: Manifest, model: str) -> list[int]:
    """The directory entries that ``pins`` name. Raises :class:`ConfigError` if one is not there."""
    layers = manifest.layers
    numbers = [layer.layer for layer in layers]
    first = dict(zip(numbers, manifest.first_entries, strict=True))
    sizes = {layer.layer: layer.num_experts for layer in layers}
    entries: dict[int, None] = {}
    for pin in pins:
        wanted_layers, wanted_experts = _parse_pin(pin)
        for layer_number in wanted_layers if wanted_layers is not None else first:
            if layer_number not in first:
                raise ConfigError(
                    f"{model!r} has no layer {layer_number} with experts, which {pin!r} pins; "
                    f"its first is {min(first)}, its last {max(first)}."
                )
            experts = wanted_experts or range(sizes[layer_number])
            if experts[-1] >= sizes[layer_number]:
                raise ConfigError(
                    f"{model!r} has no expert {experts[-1]} in layer {layer_number}, which {pin!r} "
                    f"pins; it has {sizes[layer_number]}, numbered from 0."
                )
            entries.update(dict.fromkeys(first[layer_number] + expert for expert in experts))
    return sorted(entries)


def _parse_pin(text: str) -> tuple[range | None, range | None]:
    """The layers and experts that ``text`` names; None: all. Raises :class:`ConfigError`."""
    match = _PIN.fullmatch(text)
    parts = [_parse_range(match, group) for group in (1, 4)] if match else []
    if not parts or any(part is not None and not part for part in parts):
        raise ConfigError(
            f"{text!r} is no pin; write LAYER:EXPERT, each a number, a range 0-3, or * for all."
        )
    return parts[0], parts[1]


def _parse_range(match: re.Match[str], group: int) -> range | None:
    if match[group] == "*":
        return None
    start = int(match[group + 1])
    return range(start, int(match[group + 2] or start) + 1)


def _size(value: object) -> int:
    """Raises ValueError."""
    if isinstance(value, str):
        return parse_bytes(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    raise ValueError(f"{value!r} is not a size; write it like 512MiB or 24GiB")
