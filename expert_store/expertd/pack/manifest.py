"""``pack.json``: what a pack holds and where.

A pack is a directory::

    pack.json                  this manifest
    experts-00000.safetensors  one U8 tensor per expert, each on a 4 KiB boundary
    trunk.safetensors          all other weights, under the checkpoint's own names
    config.json, tokenizer...  copied from the checkpoint

Everything here is plain data, checked when it is decoded.
"""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta
from xxhash import xxh3_64_hexdigest

from expertd.errors import PackError

MANIFEST_NAME = "pack.json"
TRUNK_NAME = "trunk.safetensors"
FORMAT_NAME = "expertd-pack"
FORMAT_VERSION = 1
PAGE_BYTES = 4096
MAX_MANIFEST_BYTES = 256 << 20

Count = Annotated[int, Meta(ge=1, le=1 << 32)]
Bytes = Annotated[int, Meta(ge=0, le=1 << 48)]
Checksum = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]


class Encoding(StrEnum):
    """How a matrix's weights are written."""

    PLAIN = "plain"
    """The tensor itself."""
    HQQ = "hqq"
    """q, scale and zero with w = (q - zero) * scale, groups along the input dimension."""


class GateOrder(StrEnum):
    """How the model's own code orders the rows of ``gate_up``; records hold gate, then up."""

    CONCATENATED = "concatenated"
    INTERLEAVED = "interleaved"


class _Struct(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    pass


class Part(_Struct):
    """A contiguous piece of a record; ``dtype`` in safetensors' names (U8, F16, BF16, F32)."""

    name: str
    offset: Bytes
    num_bytes: Bytes
    shape: tuple[Count, ...]
    dtype: str


class Matrix(_Struct):
    """One of an expert's matrices, ``[out_features, in_features]``.

    Its parts are ``NAME.weight`` if plain, else ``NAME.q``, ``NAME.scale``, ``NAME.zero``
    (and with ``meta_group_size`` for each of the two ``.q``, ``.scale``, ``.zero`` again);
    ``NAME.bias`` where the model has biases.
    """

    name: str
    encoding: Encoding
    out_features: Count
    in_features: Count
    bits: Annotated[int, Meta(ge=0, le=8)] = 0
    group_size: Annotated[int, Meta(ge=0)] = 0
    meta_group_size: Annotated[int, Meta(ge=0)] = 0


class RecordLayout(_Struct):
    """How the bytes of a record are divided; ``record_bytes`` is a multiple of 4 KiB."""

    record_bytes: Count
    parts: tuple[Part, ...]
    matrices: tuple[Matrix, ...]

    def part(self, name: str) -> Part:
        """The part of that name; ``KeyError`` if there is none."""
        for part in self.parts:
            if part.name == name:
                return part
        raise KeyError(name)


class Layer(_Struct):
    """One MoE layer; the tuples have an element per expert.

    ``layer`` is the decoder layer's index in the model, ``layout`` one into
    ``Manifest.layouts``, ``files`` ones into ``Manifest.files``.
    """

    layer: Annotated[int, Meta(ge=0, le=1 << 20)]
    num_experts: Count
    experts_per_token: Count
    layout: Annotated[int, Meta(ge=0)]
    files: tuple[Annotated[int, Meta(ge=0)], ...]
    offsets: tuple[Bytes, ...]
    checksums: tuple[Checksum, ...]


class PackFile(_Struct):
    """A file of the pack, by name and size."""

    name: str
    num_bytes: Bytes


class QuantizedTensor(_Struct):
    """A trunk matrix that ``trunk.safetensors`` holds as ``NAME.q``, ``NAME.scale`` and so on.

    ``name`` is the checkpoint's; ``matrix.name`` repeats it.
    """

    name: str
    matrix: Matrix
    dtype: str


class Manifest(_Struct):
    """All of ``pack.json``."""

    format: str
    format_version: int
    architecture: str
    model_type: str
    scheme: str
    dtype: str
    gate_order: GateOrder
    layers: tuple[Layer, ...]
    layouts: tuple[RecordLayout, ...]
    files: tuple[PackFile, ...]
    trunk: PackFile
    trunk_checksum: Checksum
    trunk_quantized: tuple[QuantizedTensor, ...] = ()

    @property
    def num_experts(self) -> int:
        """Experts of all layers together: the directory's entries."""
        return sum(layer.num_experts for layer in self.layers)

    @property
    def expert_bytes(self) -> int:
        """Size of all records."""
        return sum(
            layer.num_experts * self.layouts[layer.layout].record_bytes for layer in self.layers
        )

    @property
    def working_set_bytes(self) -> int:
        """What one token uses: the least budget that can serve the model."""
        return sum(
            layer.experts_per_token * self.layouts[layer.layout].record_bytes
            for layer in self.layers
        )

    @property
    def max_record_bytes(self) -> int:
        """Size of the largest record."""
        return max(self.layouts[layer.layout].record_bytes for layer in self.layers)


class Fingerprinted(msgspec.Struct, frozen=True):
    """A manifest and what identifies the content of its pack."""

    manifest: Manifest
    fingerprint: str


def encode_manifest(manifest: Manifest) -> bytes:
    """The bytes of ``pack.json``."""
    return msgspec.json.format(msgspec.json.encode(manifest), indent=1) + b"\n"


def decode_manifest(data: bytes, where: str = MANIFEST_NAME) -> Fingerprinted:
    """The manifest in ``data``, checked. Raises :class:`PackError`; ``where`` names the file."""
    try:
        head = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        name = msgspec.json.decode(head.get("format", msgspec.Raw(b"null")))
        version = msgspec.json.decode(head.get("format_version", msgspec.Raw(b"null")))
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise PackError(
            f"{where} is not a pack manifest ({error}); make the pack with `expertd pack`."
        ) from error
    if name != FORMAT_NAME:
        raise PackError(f"{where} is not an expertd pack; make one with `expertd pack`.")
    if version != FORMAT_VERSION:
        raise PackError(
            f"{where} has pack format version {version!r}, and this expertd reads "
            f"{FORMAT_VERSION}; pack the checkpoint again or use a matching expertd."
        )
    try:
        manifest = msgspec.json.decode(data, type=Manifest)
        _check(manifest)
    except (msgspec.MsgspecError, RecursionError, ValueError) as error:
        raise PackError(f"{where} is damaged ({error}); pack the checkpoint again.") from error
    return Fingerprinted(manifest, xxh3_64_hexdigest(data))


def read_manifest(pack: Path) -> Fingerprinted:
    """The manifest of the pack in directory ``pack``. Raises :class:`PackError`."""
    path = pack / MANIFEST_NAME
    try:
        if path.stat().st_size > MAX_MANIFEST_BYTES:
            raise PackError(f"{path} is larger than any manifest; it is not a pack's.")
        data = path.read_bytes()
    except FileNotFoundError as error:
        raise PackError(f"{pack} is not a pack: it has no {MANIFEST_NAME}.") from error
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error.strerror}.") from error
    return decode_manifest(data, str(path))


def _check(manifest: Manifest) -> None:
    """What types alone do not say. Raises ValueError."""
    if not manifest.layers:
        raise ValueError("it has no MoE layers")
    if not all(_is_plain_name(file.name) for file in (*manifest.files, manifest.trunk)):
        raise ValueError("a file name leads out of the pack")
    for layout in manifest.layouts:
        if layout.record_bytes % PAGE_BYTES:
            raise ValueError("a record's size is not a multiple of 4 KiB")
        for part in layout.parts:
            if part.offset + part.num_bytes > layout.record_bytes:
                raise ValueError(f"part {part.name} reaches past the record")
    previous = -1
    for layer in manifest.layers:
        if layer.layer <= previous:
            raise ValueError("layers are not in order")
        previous = layer.layer
        if not 1 <= layer.experts_per_token <= layer.num_experts:
            raise ValueError(f"layer {layer.layer} uses more experts per token than it has")
        if layer.layout >= len(manifest.layouts):
            raise ValueError(f"layer {layer.layer} names a layout that is not there")
        if not (
            len(layer.files) == len(layer.offsets) == len(layer.checksums) == layer.num_experts
        ):
            raise ValueError(f"layer {layer.layer} does not list each expert once")
        record_bytes = manifest.layouts[layer.layout].record_bytes
        for file, offset in zip(layer.files, layer.offsets, strict=True):
            if file >= len(manifest.files):
                raise ValueError(f"layer {layer.layer} names a file that is not there")
            if offset % PAGE_BYTES or offset + record_bytes > manifest.files[file].num_bytes:
                raise ValueError(f"a record of layer {layer.layer} lies outside its file")


def _is_plain_name(name: str) -> bool:
    return bool(name) and Path(name).name == name and name not in {".", ".."}
