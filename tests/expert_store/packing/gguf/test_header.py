"""Headers of GGUF files: what the gguf package reads in sound ones, a sentence for others."""

import os
import struct
from pathlib import Path

import gguf
import pytest
from gguf import GGMLQuantizationType as Type
from hypothesis import given
from hypothesis import strategies as st

from expertd.packing.gguf.header import MAGIC, read_header
from expertd.packing.gguf.model_file import part_names, read_model
from expertstore.errors import CheckpointError
from tests.fuzz.budget import bounded
from tests.gguf_files import make_gguf_model, write_gguf


@pytest.fixture(scope="module")
def model_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    model = make_gguf_model("qwen2_moe", num_hidden_layers=1)
    kinds = {"attn_q": Type.Q4_0, "ffn_down_exps": Type.Q8_0, "ffn_up_exps": Type.F16}
    return write_gguf(
        model,
        tmp_path_factory.mktemp("gguf") / "model.gguf",
        lambda name: next((kinds[part] for part in kinds if part in name), Type.BF16),
    )


def test_it_is_what_the_gguf_package_reads(model_file: Path) -> None:
    found, reader = read_header(model_file), gguf.GGUFReader(model_file)
    fields = {name: field.contents() for name, field in reader.fields.items() if "GGUF" not in name}
    assert found.metadata == fields
    assert [
        (each.name, each.shape[::-1], each.type, each.offset, each.num_bytes)
        for each in found.tensors.values()
    ] == [
        (each.name, tuple(each.shape), each.tensor_type, each.data_offset, each.n_bytes)
        for each in reader.tensors
    ]


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def header(
    *values: bytes, tensors: tuple[bytes, ...] = (), version: int = 3, more: bytes = b""
) -> bytes:
    counts = struct.pack("<IQQ", version, len(tensors), len(values))
    return MAGIC + counts + b"".join((*values, *tensors)) + more


def number(key: str, value: int, kind: int = 4) -> bytes:
    return text(key) + struct.pack("<II", kind, value)


def tensor(name: str, *shape: int, kind: int = 0, offset: int = 0) -> bytes:
    dimensions = struct.pack(f"<I{len(shape)}Q", len(shape), *shape)
    return text(name) + dimensions + struct.pack("<IQ", kind, offset)


DATA = b"\0" * 4096


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "it does not begin as GGUF files do"),
        (b"PK\3\4" * 9, "it does not begin as GGUF files do"),
        (header(version=1), "version 1, and known are 2 and 3"),
        (header(version=3 << 24), "machines of the other byte order"),
        (header()[:12], "its header ends past its 12 bytes"),
        (MAGIC + struct.pack("<IQQ", 3, 1 << 62, 0), "claims 4611686018427387904 tensors, more"),
        (MAGIC + struct.pack("<IQQ", 3, 0, 1 << 62), "claims 4611686018427387904 values, more"),
        (header(struct.pack("<Q", 1 << 60) + DATA), "its header ends past its"),
        (header(text("a") + struct.pack("<IIQ", 9, 8, 1 << 50)), "a claims 1125899906842624 texts"),
        (header(text("a") + struct.pack("<IIQ", 9, 4, 1 << 50)), "its header ends past its"),
        (header(text("a") + struct.pack("<IIQ", 9, 9, 1)), "a is an array of arrays"),
        (header(number("a", 1, kind=13)), "a has the unknown type 13"),
        (header(number("a", 1), number("a", 1)), "it has a twice"),
        (header(struct.pack("<Q", 1) + b"\xff" + DATA), "a text in its header is not UTF-8"),
        (header(number("general.alignment", 0)), "its alignment is 0, and must be a power of two"),
        (header(number("general.alignment", 24)), "its alignment is 24"),
        (header(number("general.alignment", 1 << 31)), "its alignment is 2147483648"),
        (header(number("general.alignment", 1, kind=7)), "its alignment is True|ends past"),
        (header(tensors=(tensor("t"),), more=DATA), "t has 0 dimensions"),
        (header(tensors=(tensor("t", *[1] * 5),), more=DATA), "t has 5 dimensions"),
        (header(tensors=(tensor("t", 4, kind=99),), more=DATA), "t has the unknown type 99"),
        (
            header(tensors=(tensor("t", 4, kind=2),), more=DATA),
            "t in Q4_0 has the shape .4., which",
        ),
        (header(tensors=(tensor("t", 0, 4),), more=DATA), "t in F32 has the shape .4, 0., which"),
        (header(tensors=(tensor("t", 4, offset=8),), more=DATA), "t is not aligned to 32 bytes"),
        (header(tensors=(tensor("t", 4),) * 2, more=DATA), "it has the tensor t twice"),
        (header(tensors=(tensor("t", 4096),), more=DATA), "it is cut off: t ends at byte"),
        (header(tensors=(tensor("t", *[1 << 40] * 4),), more=DATA), "it is cut off: t ends"),
        (
            header(tensors=(tensor("t", 32), tensor("u", 32, offset=64)), more=DATA),
            "u lies on another tensor",
        ),
    ],
)
def test_what_is_wrong_with_a_file(content: bytes, message: str, tmp_path: Path) -> None:
    file = tmp_path / "m.gguf"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"m.gguf cannot be used: .*({message})") as caught:
        read_header(file)
    assert "\n" not in str(caught.value)


@bounded(100)
@given(data=st.data())
def test_a_bent_file(data: st.DataObject, model_file: Path) -> None:
    """It is read or refused; nothing that it claims costs memory or another error."""
    sound = model_file.read_bytes()
    bent = bytearray(sound)
    for _ in range(data.draw(st.integers(0, 3))):
        # Mostly of the table of tensors and the first values, not of the vocabulary.
        place = data.draw(st.integers(0, 1500) | st.integers(0, len(bent) - 8))
        width = data.draw(st.sampled_from([1, 4, 8]))
        value = data.draw(st.sampled_from([0, 1, 2, 8, 9, 255, 2**31, 2**32 - 1, 2**63, 2**64 - 1]))
        bent[place : place + width] = (value % 256**width).to_bytes(width, "little")
    if data.draw(st.booleans()):
        del bent[data.draw(st.integers(0, len(bent) - 1)) :]
    file = model_file.with_name("bent.gguf")
    file.write_bytes(bent)
    try:
        found = read_model(file)
    except CheckpointError as error:
        assert "\n" not in str(error)  # noqa: PT017
        assert len(str(error)) < 1000  # noqa: PT017
    else:
        ends = [each.offset + each.num_bytes for each in found.tensors.values()]
        assert max(ends, default=0) <= len(bent)


def split_model(folder: Path) -> list[Path]:
    write_gguf(
        make_gguf_model("mixtral", num_hidden_layers=1), folder / "m.gguf", split_max_tensors=5
    )
    return sorted(folder.glob("*.gguf"))


def test_parts(tmp_path: Path) -> None:
    parts = split_model(tmp_path)
    count = len(parts)
    assert [file.name for file in parts] == part_names(parts[1].name)
    assert count > 2
    assert read_model(parts[-1]) == read_model(parts[0])
    assert len(read_model(parts[0]).tensors) == 13
    saved = parts[1].read_bytes()
    parts[1].unlink()
    with pytest.raises(
        CheckpointError, match=rf"{parts[1].name} is not there, a part of the model"
    ):
        read_model(parts[0])
    parts[1].write_bytes(parts[2].read_bytes())
    with pytest.raises(CheckpointError, match=r"is part 2 by its metadata .* another by its name"):
        read_model(parts[0])
    parts[1].write_bytes(saved)
    alone = parts[0].rename(tmp_path / "alone.gguf")
    with pytest.raises(CheckpointError, match=rf"is one of {count} parts by its metadata, and one"):
        read_model(alone)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            [text("general.type") + struct.pack("<I", 8) + text("mmproj")],
            "the part of a model that",
        ),
        ([text("general.type") + struct.pack("<I", 8) + text("adapter")], "is an adapter"),
        ([text("general.type") + struct.pack("<I", 8) + text("imatrix")], "holds no model"),
        ([], "lacks general.architecture"),
        ([number("general.architecture", 3)], "has general.architecture of another kind"),
        ([number("split.tensors.count", 3)], "have 0 of 3 tensors"),
    ],
)
def test_files_that_are_no_language_model(
    values: list[bytes], message: str, tmp_path: Path
) -> None:
    (tmp_path / "m.gguf").write_bytes(header(*values))
    with pytest.raises(CheckpointError, match=message):
        read_model(tmp_path / "m.gguf")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match=r"is not there; download it"):
        read_model(tmp_path / "pipe.gguf")
    with pytest.raises(CheckpointError, match=r"absent.gguf is not there; download it"):
        read_model(tmp_path / "absent.gguf")
    with pytest.raises(CheckpointError, match=r"named as a part of a model that has no such part"):
        read_model(tmp_path / "m-00003-of-00002.gguf")
