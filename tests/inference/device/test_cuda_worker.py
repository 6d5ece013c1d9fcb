"""Workers on a real GPU give the text that the CPU gives, however they decode."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd.pack.manifest import read_manifest
from expertd_inference import GenerationSettings, Worker, generate
from expertd_inference.attachment import attach
from expertd_inference.device.device import CopyMode
from expertd_inference.device.graphs import SegmentSteps
from expertd_inference.device.group import DeviceGroup
from expertd_inference.device.whole import WholeSteps
from expertd_inference.settings import DecodeGraphsMode, DeviceSettings, OnMiss
from tests.daemon import serving

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]
Make = Callable[..., Any]
STEPS = {DecodeGraphsMode.SEGMENTS: SegmentSteps, DecodeGraphsMode.WHOLE: WholeSteps}
PROMPT = "Once upon a time"
NUM_TOKENS = 24


def tokens_of(worker: Worker) -> list[int]:
    return generate(worker, PROMPT, GenerationSettings(max_new_tokens=NUM_TOKENS)).result.tokens


def worker_of(daemon: Any, **settings: Any) -> Worker:
    # In fp32 a token would have to be a tie to differ from the CPU's.
    return Worker(
        attach("m", daemon.socket),
        dtype=torch.float32,
        device=DeviceSettings(**settings) if settings else None,
        say=lambda _: None,
    )


@pytest.fixture(scope="module", params=["bf16", "4bit"])
def pack(request: pytest.FixtureRequest, packed: Make) -> Path:
    path: Path = packed("example", request.param)
    return path


@pytest.fixture(scope="module")
def expected(pack: Path) -> list[int]:
    with serving({"m": pack}) as daemon, worker_of(daemon) as worker:
        return tokens_of(worker)


@pytest.mark.parametrize("share", [1.0, 0.5], ids=["all cached", "half cached"])
@pytest.mark.parametrize(
    "mode", [DecodeGraphsMode.OFF, DecodeGraphsMode.SEGMENTS, DecodeGraphsMode.WHOLE]
)
def test_the_text_is_the_cpu_s(
    mode: DecodeGraphsMode, share: float, pack: Path, expected: list[int]
) -> None:
    manifest = read_manifest(pack).manifest
    budget = int(manifest.expert_bytes * share) + 4 * manifest.max_record_bytes
    with (
        serving({"m": pack}) as daemon,
        worker_of(
            daemon, device="cuda:0", decode_graphs=mode, cache_bytes=budget, on_miss=OnMiss.COPY
        ) as worker,
    ):
        assert [tokens_of(worker) for _ in range(2)] == [expected] * 2
        assert isinstance(worker._runner, DeviceGroup)
        # The daemon is of this user: the driver has nothing to refuse.
        assert {runner.engine.mode for runner in worker._runner.runners} == {CopyMode.REGISTERED}
        graphs = worker._runner.graphs
        assert (graphs is None) == (mode is DecodeGraphsMode.OFF)
        if graphs is not None:
            # Segments would replay as well.
            assert graphs._current is not None
            assert type(graphs._current.steps) is STEPS[mode]
            # The second text begins with what the first recorded.
            assert graphs.num_replays == 2 * (NUM_TOKENS - 1) - 2, "it could not be recorded"
        stats = worker.device_stats
        assert stats is not None
        assert (stats.arena, stats.steps) == ("registered", mode.value)


@pytest.mark.parametrize("mode", [DecodeGraphsMode.OFF, DecodeGraphsMode.WHOLE])
def test_from_too_little_ram(mode: DecodeGraphsMode, pack: Path, expected: list[int]) -> None:
    """What was copied before is overwritten in the arena: no cache between may keep it."""
    manifest = read_manifest(pack).manifest
    with (
        serving({"m": pack}, ram=2 * manifest.working_set_bytes) as daemon,
        worker_of(
            daemon,
            device="cuda:0",
            decode_graphs=mode,
            cache_bytes=manifest.working_set_bytes + 4 * manifest.max_record_bytes,
            on_miss=OnMiss.COPY,
        ) as worker,
    ):
        assert [tokens_of(worker) for _ in range(3)] == [expected] * 3


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one CUDA device")
def test_two_devices(pack: Path, expected: list[int]) -> None:
    with serving({"m": pack}) as daemon:
        with worker_of(daemon, device="cuda:0,cuda:1") as spread:
            assert tokens_of(spread) == expected
            # One registration serves both.
            stats = spread.device_stats
            assert stats is not None
            assert stats.arena == "registered"
        with worker_of(daemon, device="cuda:0") as one, worker_of(daemon, device="cuda:1") as other:
            assert tokens_of(one) == tokens_of(other) == expected
