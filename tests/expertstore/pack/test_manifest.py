"""The manifest: it survives its own encoding, and no other bytes get through."""

import contextlib
import json
from pathlib import Path
from typing import Any

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertstore.errors import PackError
from expertstore.pack.layout import Encoding, Matrix, record_layout
from expertstore.pack.manifest import (
    GateOrder,
    Layer,
    Manifest,
    PackFile,
    QuantizedTensor,
    decode_manifest,
    encode_manifest,
    read_manifest,
)


def hqq(name: str, bits: int) -> Matrix:
    return Matrix(
        name=name,
        encoding=Encoding.HQQ,
        out_features=64,
        in_features=128,
        bits=bits,
        group_size=64,
    )


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    layout = record_layout((hqq("gate_up", draw(st.sampled_from([2, 3, 4, 8]))),), "BF16",
                           has_bias=draw(st.booleans()))  # fmt: skip
    rows, offset = [], 4096
    checksums = st.integers(0, 2**64 - 1).map(lambda value: f"{value:016x}")
    for layer in sorted(draw(st.sets(st.integers(0, 200), min_size=1, max_size=3))):
        experts = draw(st.integers(1, 4))
        rows.append(
            Layer(
                layer=layer,
                num_experts=experts,
                experts_per_token=draw(st.integers(1, experts)),
                layout=0,
                files=(0,) * experts,
                offsets=tuple(offset + i * layout.record_bytes for i in range(experts)),
                checksums=tuple(draw(checksums) for _ in range(experts)),
            )
        )
        offset += experts * layout.record_bytes
    return Manifest(
        format="expertd-pack",
        format_version=2,
        architecture=draw(st.text()),
        model_type="m",
        scheme="s",
        dtype="BF16",
        gate_order=draw(st.sampled_from(GateOrder)),
        layers=tuple(rows),
        layouts=(layout,),
        files=(PackFile(name="experts-00000.safetensors", num_bytes=offset),),
        trunk=PackFile(name="trunk.safetensors", num_bytes=9),
        trunk_checksum=draw(checksums),
        trunk_quantized=(QuantizedTensor(name="q", matrix=hqq("q", 4), dtype="BF16"),),
    )


@given(manifests())
def test_encoding_and_decoding_agree(manifest: Manifest) -> None:
    found = decode_manifest(encode_manifest(manifest))
    assert found.manifest == manifest
    assert found.manifest.num_experts == sum(layer.num_experts for layer in manifest.layers)
    assert found.manifest.first_entries[0] == 0
    assert len(found.manifest.first_entries) == len(manifest.layers)


@given(manifests(), manifests())
def test_fingerprints_tell_manifests_apart(one: Manifest, other: Manifest) -> None:
    same = encode_manifest(one) == encode_manifest(other)
    fingerprints = {decode_manifest(encode_manifest(m)).fingerprint for m in (one, other)}
    assert (len(fingerprints) == 1) is same


@given(st.binary(max_size=200))
def test_arbitrary_bytes_are_refused(data: bytes) -> None:
    with pytest.raises(PackError):
        decode_manifest(data)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner,
                                                                 max_size=3),
    max_leaves=8,
)  # fmt: skip


@given(JSON)
def test_arbitrary_json_is_refused(value: Any) -> None:
    with pytest.raises(PackError):
        decode_manifest(json.dumps(value).encode())


@given(manifests(), st.data())
def test_a_bent_manifest_is_refused_or_still_sound(manifest: Manifest, data: st.DataObject) -> None:
    """One value anywhere replaced: an error of ours, or a manifest that passes all checks."""
    tree = json.loads(encode_manifest(manifest))
    place, key = tree, data.draw(st.sampled_from(sorted(tree)))
    while isinstance(place[key], dict | list) and place[key] and data.draw(st.booleans()):
        place = place[key]
        key = data.draw(
            st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place)))
        )
    place[key] = data.draw(JSON | st.integers(-2, 1 << 50))
    try:
        found = decode_manifest(json.dumps(tree).encode()).manifest
    except PackError:
        return
    for layer in found.layers:  # what a reader does with it cannot go out of bounds
        size = found.layouts[layer.layout].record_bytes
        for file, offset in zip(layer.files, layer.offsets, strict=True):
            assert 0 <= offset <= found.files[file].num_bytes - size


@given(manifests(), st.data())
def test_a_damaged_file_is_refused_or_decoded(manifest: Manifest, data: st.DataObject) -> None:
    encoded = bytearray(encode_manifest(manifest))
    for _ in range(data.draw(st.integers(1, 4))):
        encoded[data.draw(st.integers(0, len(encoded) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(PackError):
        decode_manifest(bytes(encoded[: data.draw(st.integers(0, len(encoded)))]))


def one_manifest() -> dict[str, Any]:
    layout = record_layout((hqq("gate_up", 4),), "BF16", has_bias=False)
    layer = Layer(
        layer=3,
        num_experts=2,
        experts_per_token=1,
        layout=0,
        files=(0, 0),
        offsets=(4096, 4096 + layout.record_bytes),
        checksums=("0" * 16,) * 2,
    )
    manifest = Manifest(
        format="expertd-pack",
        format_version=2,
        architecture="A",
        model_type="m",
        scheme="s",
        dtype="BF16",
        gate_order=GateOrder.CONCATENATED,
        layers=(layer,),
        layouts=(layout,),
        files=(PackFile(name="e", num_bytes=4096 + 2 * layout.record_bytes),),
        trunk=PackFile(name="t", num_bytes=0),
        trunk_checksum="0" * 16,
        trunk_quantized=(QuantizedTensor(name="q", matrix=hqq("q", 4), dtype="BF16"),),
    )
    tree: dict[str, Any] = json.loads(msgspec.json.encode(manifest))
    return tree


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (("format",), "zip", "is not an expertd pack"),
        (("format_version",), 3, "has pack format version 3, and this expertd reads 1 to 2; pack"),
        (("layers",), [], "no MoE layers"),
        (("surprise",), 1, "unknown field"),
        (("files", 0, "name"), "../e", "leads out of the pack"),
        (("trunk", "name"), "e", "one name"),
        (("layers", 0, "offsets", 0), 1, "outside its file"),
        (("layers", 0, "offsets", 1), 1 << 40, "outside its file"),
        (("layers", 0, "files", 1), 1, "names a file that is not there"),
        (("layers", 0, "layout"), 1, "names a layout that is not there"),
        (("layers", 0, "num_experts"), 3, "does not list each expert once"),
        (("layers", 0, "experts_per_token"), 3, "more experts per token than it has"),
        (("layers", 0, "checksums", 0), "xyz", "is damaged"),
        (("layouts", 0, "matrices", 0, "bits"), 5, "5 bits"),
        (("layouts", 0, "matrices", 0, "group_size"), 0, "group size 0"),
        (("trunk_quantized", 0, "matrix", "name"), "k", "does not say how it is quantized"),
        (("trunk_quantized", 0, "matrix", "group_size"), 63, "group size 63"),
        (
            ("layouts", 0, "matrices", 0, "encoding"),
            "nvfp4",
            "is NVFP4, which has 4 bits and groups",
        ),
        (("layouts", 0, "matrices", 0, "encoding"), "int5", "Invalid enum value 'int5'"),
        (("layouts", 0, "matrices", 0, "group_rows"), 0, "group_rows"),
    ],
)
def test_each_check_has_its_sentence(path: tuple[Any, ...], value: Any, message: str) -> None:
    tree = one_manifest()
    decode_manifest(json.dumps(tree).encode())
    place: Any = tree
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    with pytest.raises(PackError, match=message) as caught:
        decode_manifest(json.dumps(tree).encode(), "x/pack.json")
    assert str(caught.value).startswith("x/pack.json ")
    assert "\n" not in str(caught.value)


def test_packs_of_format_version_1_stay_readable() -> None:
    """They had no ``group_rows``."""
    new = one_manifest()
    old = new | {"format_version": 1}
    for matrix in [old["layouts"][0]["matrices"][0], old["trunk_quantized"][0]["matrix"]]:
        del matrix["group_rows"]
    read = decode_manifest(json.dumps(old).encode()).manifest
    assert read == msgspec.convert(one_manifest() | {"format_version": 1}, Manifest)


def test_no_pack(tmp_path: Path) -> None:
    with pytest.raises(PackError, match=r"is not a pack: it has no pack\.json"):
        read_manifest(tmp_path)
    with pytest.raises(PackError, match="is not a pack"):
        read_manifest(tmp_path / "absent")
    (tmp_path / "pack.json").mkdir()
    with pytest.raises(PackError, match="cannot be read: it is not a regular file"):
        read_manifest(tmp_path)
