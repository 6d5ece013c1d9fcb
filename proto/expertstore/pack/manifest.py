"""``pack.json``: what a pack holds and where.

A pack is a directory::

    pack.json                  this manifest
    experts-00000.safetensors  one U8 tensor per expert, each on a 4 KiB boundary
    table-00000.safetensors    a table by rows (:mod:`expertstore.pack.table`), if the model has any
    trunk.safetensors          all other weights, under the checkpoint's own names
    config.json, tokenizer...  copied from the checkpoint

Everything here is plain data, checked when it is decoded.
"""

from enum import StrEnum
from itertools import accumulate
from pathlib import Path
from typing import Annotated

import msgspec
from msgspec import Meta
from xxhash import xxh3_64_hexdigest

from expertstore.errors import PackError
from expertstore.pack.files import open_regular
from expertstore.pack.layout import (
    PAGE_BYTES,
    Bytes,
    Count,
    Encoding,
    Matrix,
    Part,
    RecordLayout,
    Struct,
    check_layout,
    matrix_parts,
)
from expertstore.pack.table import Table, check_table

__all__ = [
    "FORMAT_NAME",
    "FORMAT_VERSION",
    "MANIFEST_NAME",
    "PAGE_BYTES",
    "TRUNK_NAME",
    "Encoding",
    "Fingerprinted",
    "GateOrder",
    "Layer",
    "Manifest",
    "Matrix",
    "PackFile",
    "Part",
    "QuantizedTensor",
    "RecordLayout",
    "Table",
    "decode_manifest",
    "encode_manifest",
    "read_manifest",
]

MANIFEST_NAME = "pack.json"
TRUNK_NAME = "trunk.safetensors"
FORMAT_NAME = "expertd-pack"
FORMAT_VERSION = 2
READABLE_VERSIONS = range(1, FORMAT_VERSION + 1)
"""1 knew plain matrices, HQQ and MXFP4 only; whatever it says means the same in 2."""
MAX_MANIFEST_BYTES = 256 << 20

Checksum = Annotated[str, Meta(pattern="^[0-9a-f]{16}$")]
"""XXH3-64 in hex."""


class GateOrder(StrEnum):
    """How the model's own code orders the rows of ``gate_up``; records hold gate, then up."""

    CONCATENATED = "concatenated"
    INTERLEAVED = "interleaved"


class Layer(Struct, frozen=True):
    """One MoE layer; the tuples have an element per expert.

    The directory has an entry per expert: layers in the manifest's order, experts in theirs.
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


class PackFile(Struct, frozen=True):
    """A file of the pack, by name and size."""

    name: str
    num_bytes: Bytes


class QuantizedTensor(Struct, frozen=True):
    """A trunk matrix that ``trunk.safetensors`` holds as ``NAME.q``, ``NAME.scale`` and so on.

    ``name`` is the checkpoint's full name of the tensor, ``.weight`` included;
    ``matrix.name`` repeats it. ``dtype`` is what it had before, in safetensors' names.
    """

    name: str
    matrix: Matrix
    dtype: str


class Manifest(Struct, frozen=True):
    """All of ``pack.json``.

    ``dtype`` is that of the model's 16-bit weights and of its activations, in safetensors'
    names: BF16 or F16. ``trunk_checksum`` is that of the whole trunk file, a record's is that
    of the whole padded record.
    """

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
    tables: tuple[Table, ...] = ()

    @property
    def first_entries(self) -> tuple[int, ...]:
        """Per layer of ``layers``, the directory's entry of its expert 0."""
        return (0, *accumulate(layer.num_experts for layer in self.layers))[:-1]

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
    def table_bytes(self) -> int:
        """Size of all tables' files."""
        return sum(table.num_bytes for table in self.tables)

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
    if version not in READABLE_VERSIONS:
        raise PackError(
            f"{where} has pack format version {version!r}, and this expertd reads "
            f"{READABLE_VERSIONS[0]} to {FORMAT_VERSION}; pack the checkpoint again or use a "
            f"matching expertd."
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
        with open(open_regular(path), "rb") as file:  # noqa: PTH123 - of a descriptor
            data = file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError as error:
        raise PackError(f"{pack} is not a pack: it has no {MANIFEST_NAME}.") from error
    except OSError as error:
        raise PackError(f"{path} cannot be read: {error.strerror}.") from error
    if len(data) > MAX_MANIFEST_BYTES:
        raise PackError(f"{path} is larger than any manifest; it is not a pack's.")
    return decode_manifest(data, str(path))


def _check(manifest: Manifest) -> None:
    """What types alone do not say. Raises ValueError."""
    if not manifest.layers:
        raise ValueError("it has no MoE layers")
    names = [file.name for file in (*manifest.files, manifest.trunk)]
    names += [table.file for table in manifest.tables]
    if not all(_is_plain_name(name) for name in names):
        raise ValueError("a file name leads out of the pack")
    if len(set(names)) != len(names):
        raise ValueError("two of its files have one name")
    for layout in manifest.layouts:
        check_layout(layout)
    for table in manifest.tables:
        check_table(table)
    for tensor in manifest.trunk_quantized:
        if tensor.matrix.name != tensor.name or tensor.matrix.encoding is Encoding.PLAIN:
            raise ValueError(f"the trunk's {tensor.name} does not say how it is quantized")
        matrix_parts(tensor.matrix, tensor.dtype)
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
