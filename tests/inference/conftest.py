import os
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

# Before torch: tests of several processes on few cores must not spin for each other.
os.environ |= {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1"}

import pytest
import torch
from transformers import AutoModelForCausalLM

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_testing.tiny_models import make_checkpoint
from tests.inference.worker_process import WorkerProcess
from tests.random_mxfp4 import make_mxfp4_checkpoint

EXAMPLE = Path(__file__).parents[2] / "examples/tiny-mixtral"

Make = Callable[..., Any]


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured here is not for the user's workers to believe."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A checkpoint of an architecture, by name.

    ``example`` is the trained one, ``gpt_oss_mxfp4`` one whose experts come in MXFP4.
    """

    @cache
    def make(architecture: str) -> Path:
        if architecture == "example":
            return EXAMPLE
        if architecture == "gpt_oss_mxfp4":
            return make_mxfp4_checkpoint(tmp_path_factory.mktemp("checkpoint") / architecture)
        return make_checkpoint(architecture, tmp_path_factory.mktemp("checkpoint") / architecture)

    return make


@pytest.fixture(scope="session")
def packed(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """The pack of an architecture in a scheme."""

    @cache
    def make(
        architecture: str,
        scheme: str = "bf16",
        experts: str | None = None,
        attention: str | None = None,
    ) -> Path:
        path = tmp_path_factory.mktemp("pack") / architecture
        chosen = choose_scheme(scheme, experts, attention)
        pack(Request(checkpoint(architecture), path, chosen, optimize=False))
        return path

    return make


@pytest.fixture(scope="session")
def stock(checkpoint: Make) -> Make:
    """Stock transformers' model of an architecture, with its default settings."""

    @cache
    def make(architecture: str, dtype: torch.dtype = torch.bfloat16) -> Any:
        return AutoModelForCausalLM.from_pretrained(checkpoint(architecture), dtype=dtype)

    return make


@pytest.fixture(scope="session")
def processes() -> Iterator[list[WorkerProcess]]:
    """Three worker processes, which attach anew for every request."""
    started = [WorkerProcess() for _ in range(3)]
    yield started
    for process in started:
        process.close()
