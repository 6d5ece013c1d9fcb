"""A native library is optional, and one of other sources is not used."""

import ctypes
from pathlib import Path

import pytest

from expertstore.native import SWITCH, load
from hatch_build import LIBRARIES, find_compiler

KERNELS = LIBRARIES[1].result
needs_library = pytest.mark.skipif(not KERNELS.exists(), reason="no compiler built it")


@pytest.fixture(autouse=True)
def wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SWITCH, raising=False)


def test_where_a_compiler_is_a_library_is() -> None:
    assert KERNELS.exists() or find_compiler() is None, "run make native"


@needs_library
def test_it_loads() -> None:
    loaded = load(KERNELS)
    assert loaded.library is not None
    assert not loaded.reason


@needs_library
def test_another_abi_is_refused() -> None:
    loaded = load(KERNELS, abi=-1)
    assert loaded.library is None
    assert "other sources" in loaded.reason


@needs_library
def test_one_without_a_function_is_refused() -> None:
    loaded = load(KERNELS, functions=("expertd_linear", "expertd_of_tomorrow"))
    assert loaded.library is None
    assert "other sources" in loaded.reason


class _Other(ctypes.Structure):
    _fields_ = (("one", ctypes.c_int64),)


@needs_library
def test_a_structure_of_another_size_is_said() -> None:
    loaded = load(KERNELS, structures={"LinearCall": _Other})
    assert loaded.library is None
    assert "LinearCall has 48 bytes in libexpertd_kernels.so and 8 in Python" in loaded.reason
    assert "hatch_build.py" in loaded.reason


@needs_library
def test_a_structure_that_it_does_not_know_is_refused() -> None:
    loaded = load(KERNELS, structures={"OfTomorrow": _Other})
    assert loaded.library is None
    assert "other sources" in loaded.reason


@needs_library
def test_the_switch_turns_it_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(SWITCH, "0")
    loaded = load(KERNELS)
    assert loaded.library is None
    assert SWITCH in loaded.reason


def test_one_that_is_not_there_is_said(tmp_path: Path) -> None:
    loaded = load(tmp_path / "libnone.so")
    assert loaded.library is None
    assert "libnone.so was not built" in loaded.reason


def test_one_that_is_none_is_said(tmp_path: Path) -> None:
    (tmp_path / "libtext.so").write_text("text")
    loaded = load(tmp_path / "libtext.so")
    assert loaded.library is None
    assert "cannot be loaded" in loaded.reason
