"""Which kernels a GPU gets, and what there is to say where it can get none."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import expertd_inference
from expertd_inference.kernels.gpu import choice as gpu_choice
from expertstore.errors import PreconditionError


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    gpu_choice.gpu_kernels.cache_clear()
    yield
    gpu_choice.gpu_kernels.cache_clear()


def test_triton_serves_everything() -> None:
    pytest.importorskip("triton")
    kernels = gpu_choice.gpu_kernels()
    assert kernels.name == "triton"
    assert kernels.fill_slots_cached.__module__.endswith("triton_experts")
    assert kernels.linear.__module__.endswith("triton_linear")


def test_without_triton_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_choice, "find_spec", lambda name: None)
    with pytest.raises(PreconditionError, match="install a CUDA build of torch"):
        gpu_choice.gpu_kernels()


def test_a_worker_without_a_gpu_never_imports_triton() -> None:
    package = Path(expertd_inference.__file__).parent
    for file in package.rglob("*.py"):
        if not file.name.startswith("triton_"):
            for node in ast.parse(file.read_text()).body:
                assert "triton" not in (ast.unparse(node) if is_import(node) else ""), file


def is_import(node: ast.stmt) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)
