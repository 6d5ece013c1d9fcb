"""Packs of random bytes, made in milliseconds: for tests that never look at the weights."""

import random
from pathlib import Path

from xxhash import xxh3_64_hexdigest

from expertstore.pack.manifest import (
    FORMAT_VERSION,
    Encoding,
    GateOrder,
    Layer,
    Manifest,
    Matrix,
    PackFile,
    Part,
    RecordLayout,
    encode_manifest,
)

PAGE = 4096


def make_pack(
    path: Path,
    *,
    layers: int = 3,
    experts: int = 8,
    experts_per_token: int = 2,
    record_bytes: int = 2 * PAGE,
    seed: int = 0,
) -> Path:
    """A pack whose record of (layer, expert) is what :func:`record` gives."""
    path.mkdir(parents=True)
    rows, body = [], bytearray()
    for layer in range(layers):
        records = [record(layer, expert, record_bytes, seed) for expert in range(experts)]
        rows.append(
            Layer(
                layer=layer,
                num_experts=experts,
                experts_per_token=experts_per_token,
                layout=0,
                files=(0,) * experts,
                offsets=tuple(PAGE + len(body) + i * record_bytes for i in range(experts)),
                checksums=tuple(map(xxh3_64_hexdigest, records)),
            )
        )
        body += b"".join(records)
    (path / "experts-00000.safetensors").write_bytes(bytes(PAGE) + body)
    (path / "trunk.safetensors").write_bytes(b"")
    columns = record_bytes // 4
    layout = RecordLayout(
        record_bytes=record_bytes,
        parts=(
            _plain_part("gate_up.weight", 0, (1, columns)),
            _plain_part("down.weight", columns * 2, (columns, 1)),
        ),
        matrices=(
            Matrix(name="gate_up", encoding=Encoding.PLAIN, out_features=1, in_features=columns),
            Matrix(name="down", encoding=Encoding.PLAIN, out_features=columns, in_features=1),
        ),
    )
    manifest = Manifest(
        format="expertd-pack",
        format_version=FORMAT_VERSION,
        architecture="HandmadeForCausalLM",
        model_type="handmade",
        scheme="bf16",
        dtype="BF16",
        gate_order=GateOrder.CONCATENATED,
        layers=tuple(rows),
        layouts=(layout,),
        files=(PackFile(name="experts-00000.safetensors", num_bytes=PAGE + len(body)),),
        trunk=PackFile(name="trunk.safetensors", num_bytes=0),
        trunk_checksum=xxh3_64_hexdigest(b""),
    )
    (path / "pack.json").write_bytes(encode_manifest(manifest))
    return path


def record(layer: int, expert: int, record_bytes: int = 2 * PAGE, seed: int = 0) -> bytes:
    """The record that :func:`make_pack` writes for that expert."""
    return random.Random(f"{seed}/{layer}/{expert}").randbytes(record_bytes)


def _plain_part(name: str, offset: int, shape: tuple[int, int]) -> Part:
    return Part(
        name=name, offset=offset, num_bytes=2 * shape[0] * shape[1], shape=shape, dtype="BF16"
    )
