"""From how many rows on torch multiplies is known once an engine is open."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor

from expertd_inference import Worker
from expertd_inference.execution import choose
from expertd_inference.execution.crossover import measure_crossover
from expertd_inference.execution.parts import UnknownPartError
from expertd_inference.kernels.cpu import switching
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.linear import linear_kernels
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.kernels.cpu.switching import Switching
from expertd_inference.model.native_linear import use_native_linears
from expertstore.pack.layout import Matrix
from tests.architectures.batches import ROOM
from tests.architectures.parity import load, logits
from tests.inference.greedy import prompt_of

Make = Callable[..., Any]

pytestmark = pytest.mark.skipif(native_library().library is None, reason="no native library")

EXPERTS = {"512 x 128 hqq 4 64 0 by bfloat16 on 1 threads"}
HEAD = "257 x 128 hqq 8 128 0 by bfloat16 on 1 threads"


def refuse(*_: Any) -> None:
    raise UnknownPartError("of a test")


def test_it_is_measured_when_an_engine_opens(
    packed: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(switching, "SMALL", 0)
    measured: set[str] = set()

    def product(matrix: Matrix, rows: Tensor) -> None:
        measured.add(switching.form_of(matrix, rows.dtype))

    found = Switching(product, product, "host", path=tmp_path / "file")
    kernels = NativeKernels(most_rows=found)
    model = load(packed("mixtral", "4bit-fast"), torch.bfloat16, kernels)
    steps = linear_kernels()
    assert steps is not None
    steps.most_rows = found
    use_native_linears(model, steps)
    said: list[str] = []
    experts, linears = measure_crossover(model, kernels, said.append)
    assert experts.keys() == EXPERTS
    assert HEAD in linears
    everything = experts | linears
    measured.clear()
    logits(model, prompt_of(60))
    assert not measured, "a prompt does not wait for it"
    worker = SimpleNamespace(
        language=model,
        kernels=kernels,
        exact=False,
        device_stats=None,
        session=SimpleNamespace(say=said.append),
        _runner=None,
    )
    for make, rows in ((choose.make_program, experts), (refuse, everything)):
        monkeypatch.setattr(choose, "make_program", make)
        executor = Worker.open_executor(cast("Worker", worker), ROOM)
        assert (executor.name == "program") == (rows is experts)
        assert worker.native_rows == rows
    assert not measured
    assert not said
    plain = load(packed("mixtral"), torch.bfloat16, kernels)
    use_native_linears(plain, steps)
    experts, linears = measure_crossover(plain, kernels, said.append)
    assert experts.keys() == {form.replace("hqq 4 64", "plain 0 0") for form in EXPERTS}
    assert HEAD.replace("hqq 8 128", "plain 0 0") in linears
    exact = NativeKernels(exact=True)
    assert measure_crossover(model, exact, said.append) == ({}, {})
