"""Workers on a real GPU give the logits that the CPU gives, however they decode."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.gpu_same import (
    CPU_TOLERANCE,
    OFF,
    PROMPT_TOKENS,
    SEGMENTS,
    STEPS,
    WHOLE,
    Case,
    distance,
    given_text,
    logits,
)
from bench.gpu_state import state_of
from expertd_inference import Worker
from expertd_inference.device.group import DeviceGroup
from expertd_inference.process.attachment import attach
from expertd_inference.settings import DeviceSettings, OnMiss
from expertd_testing.daemon import serving
from expertstore.pack.manifest import read_manifest

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
Make = Callable[..., Any]
DEVICE = "cuda:0"
REGISTERED = "registered"


def worker_of(daemon: Any, device: DeviceSettings | None, kernels: str = "auto") -> Worker:
    # In fp32 what differs is no rounding.
    return Worker(
        attach("m", daemon.socket),
        dtype=torch.float32,
        kernels=kernels,
        device=device,
        say=lambda _: None,
    )


@pytest.fixture(scope="module", params=["bf16", "4bit"])
def pack(request: pytest.FixtureRequest, packed: Make) -> Path:
    path: Path = packed("example", request.param)
    return path


@pytest.fixture(scope="module")
def given(pack: Path) -> tuple[Tensor, Tensor]:
    """A text that the example was not trained on, and the CPU's logits for it."""
    with serving({"m": pack}) as daemon, worker_of(daemon, None, "reference") as worker:
        text = given_text(worker, PROMPT_TOKENS + STEPS)
        return text, logits(worker, text)


@contextmanager
def running(pack: Path, case: Case) -> Iterator[Worker]:
    """A worker on the GPU that decodes in a case's way."""
    manifest = read_manifest(pack).manifest
    ram = 2 * manifest.working_set_bytes if case.starved else 64 << 20
    settings = case.settings(manifest, DEVICE)
    with serving({"m": pack}, ram=ram) as daemon, worker_of(daemon, settings) as worker:
        yield worker


def check(case: Case, worker: Worker, given: tuple[Tensor, Tensor]) -> None:
    text, expected = given
    for _ in range(2):  # then with what the first time left in the cache
        assert distance(logits(worker, text), expected) < case.tolerance(torch.float32)
    assert isinstance(worker._runner, DeviceGroup)
    state = state_of(worker._runner)
    # Staged copies and other steps would give the same logits, slowly.
    assert (state.arena, state.steps) == (REGISTERED, case.mode)
    # The first two steps are no replays: one compiles, one records. The second text begins with
    # a replay.
    assert state.replays == (0 if case.mode is OFF else 2 * STEPS - 2)


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["all cached", "half cached"])
@pytest.mark.parametrize("mode", [OFF, SEGMENTS, WHOLE])
def test_the_logits_are_the_cpu_s(
    mode: Any, share: float, pack: Path, given: tuple[Tensor, Tensor]
) -> None:
    case = Case(mode, share)
    with running(pack, case) as worker:
        check(case, worker, given)


@pytest.mark.parametrize("on_miss", [OnMiss.CPU, OnMiss.AUTO])
def test_misses_may_be_the_cpu_s(on_miss: OnMiss, pack: Path, given: tuple[Tensor, Tensor]) -> None:
    case = Case(OFF, on_miss=on_miss)
    with running(pack, case) as worker:
        check(case, worker, given)


@pytest.mark.parametrize("mode", [OFF, WHOLE])
def test_from_too_little_ram(mode: Any, pack: Path, given: tuple[Tensor, Tensor]) -> None:
    """What was copied before is overwritten in the arena: no cache between may keep it."""
    case = Case(mode, starved=True)
    with running(pack, case) as worker:
        check(case, worker, given)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
@pytest.mark.parametrize("device", ["cuda:0,cuda:1", "cuda:1"])
def test_several_devices(device: str, pack: Path, given: tuple[Tensor, Tensor]) -> None:
    text, expected = given
    settings = DeviceSettings(device=device)
    with serving({"m": pack}) as daemon, worker_of(daemon, settings) as worker:
        # Beside another on the first: one registration of the arena serves both.
        with worker_of(daemon, DeviceSettings(device=DEVICE)) as first:
            assert distance(logits(first, text), expected) < CPU_TOLERANCE[torch.float32]
        assert distance(logits(worker, text), expected) < CPU_TOLERANCE[torch.float32]
        assert isinstance(worker._runner, DeviceGroup)
        assert state_of(worker._runner).arena == REGISTERED
