"""Which kernels a worker computes with, and that it says so when they are the slow ones."""

from collections.abc import Iterator
from pathlib import Path

import msgspec
import pytest

from expertd.packing.schemes import parse_precision
from expertd_inference.kernels.cpu.choice import cpu_kernels
from expertd_inference.kernels.cpu.library import native_library
from expertd_testing.handmade import make_pack
from expertstore.errors import InvalidInputError, PreconditionError
from expertstore.native import SWITCH
from expertstore.pack.layout import record_layout
from expertstore.pack.manifest import Manifest, read_manifest

needs_library = pytest.mark.skipif(native_library().library is None, reason="no native kernels")


@pytest.fixture
def plain(tmp_path: Path) -> Manifest:
    return read_manifest(make_pack(tmp_path / "pack")).manifest


@pytest.fixture
def quantized(plain: Manifest) -> Manifest:
    matrices = tuple(
        parse_precision("4g64").matrix(matrix.name, 128, 128)
        for matrix in plain.layouts[0].matrices
    )
    layout = record_layout(matrices, "BF16", has_bias=False)
    return msgspec.structs.replace(plain, layouts=(layout,))


@pytest.fixture
def without_library(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv(SWITCH, "0")
    native_library.cache_clear()
    yield
    native_library.cache_clear()


@needs_library
def test_auto_is_native_for_quantized_experts(quantized: Manifest) -> None:
    said: list[str] = []
    assert cpu_kernels("auto", quantized, said.append).name == "native"
    assert not said


def test_auto_is_the_reference_for_plain_experts(plain: Manifest) -> None:
    said: list[str] = []
    assert cpu_kernels("auto", plain, said.append).name == "reference"
    assert not said, "that is no loss"


@needs_library
def test_native_can_be_asked_for(plain: Manifest) -> None:
    assert cpu_kernels("native", plain).name == "native"


def test_the_reference_can_be_asked_for(quantized: Manifest) -> None:
    assert cpu_kernels("reference", quantized).name == "reference"


@pytest.mark.usefixtures("without_library")
def test_without_the_library_auto_says_so(quantized: Manifest) -> None:
    said: list[str] = []
    assert cpu_kernels("auto", quantized, said.append).name == "reference"
    assert len(said) == 1
    assert SWITCH in said[0]


@pytest.mark.usefixtures("without_library")
def test_without_the_library_native_is_refused(quantized: Manifest) -> None:
    with pytest.raises(PreconditionError, match=SWITCH):
        cpu_kernels("native", quantized)


def test_another_name_is_refused(plain: Manifest) -> None:
    with pytest.raises(InvalidInputError, match="auto, native, reference"):
        cpu_kernels("fast", plain)
