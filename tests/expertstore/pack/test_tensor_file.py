"""safetensors headers: ours are read by the safetensors package, and damage is found."""

import contextlib
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from safetensors import safe_open

from expertstore.pack.tensor_file import build_header, read_fully, read_header


def test_safetensors_reads_what_we_write(tmp_path: Path) -> None:
    header = build_header([("b", "BF16", (2, 3)), ("a", "U8", (5,)), ("none", "U8", (0,))])
    assert len(header) == 4096
    path = tmp_path / "x.safetensors"
    path.write_bytes(header + bytes(range(17)))
    with safe_open(path, framework="numpy") as file:
        assert set(file.keys()) == {"a", "b", "none"}
        assert file.get_slice("b").get_shape() == [2, 3]
        assert file.get_tensor("a").tolist() == [12, 13, 14, 15, 16]
    tensors = read_header(path)
    assert list(tensors) == ["b", "a", "none"]
    assert (tensors["a"].offset, tensors["a"].num_bytes) == (4096 + 12, 5)


def test_long_headers_take_whole_pages() -> None:
    header = build_header([(f"layers.{index}", "U8", (4096,)) for index in range(1000)])
    assert len(header) % 4096 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"short",
        (1 << 60).to_bytes(8, "little") + b"{}",
        (2).to_bytes(8, "little") + b"[]",
        (2).to_bytes(8, "little") + b"\xff\xff",
        (13).to_bytes(8, "little") + b'{"a": "wrong"',
        build_header([("a", "U8", (5,))]).replace(b"[5]", b"[6]"),
        build_header([("a", "U8", (5,))]).replace(b"[0,5]", b"[5,0]"),
        build_header([("a", "U8", (5,))]).replace(b"[0,5]", b"[-5,0]"),
    ],
)
def test_what_is_no_header_is_refused(tmp_path: Path, data: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=r"truncated|damaged"):
        read_header(path)


@given(st.binary(max_size=60), st.integers(0, 40))
def test_arbitrary_files_are_refused_or_read(
    tmp_path_factory: pytest.TempPathFactory, data: bytes, length: int
) -> None:
    path = tmp_path_factory.getbasetemp() / f"arbitrary-{os.getpid()}"
    path.write_bytes(length.to_bytes(8, "little") + data)
    with contextlib.suppress(ValueError):
        read_header(path)


def test_read_fully(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_bytes(b"0123456789")
    fd = os.open(path, os.O_RDONLY)
    try:
        assert read_fully(fd, 4, 3) == b"3456"
        assert read_fully(fd, 0, 99) == b""
        with pytest.raises(EOFError):
            read_fully(fd, 4, 7)
    finally:
        os.close(fd)
