"""A worker whose steps are recorded, on a fake device, against a real daemon."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd_inference import Worker
from expertd_inference.device.group import DeviceGroup
from expertd_inference.execution.batch import Batch
from expertd_inference.execution.executor import Executor
from expertd_inference.process.attachment import attach
from expertd_inference.settings import DecodeGraphsMode, DeviceSettings
from expertd_testing.daemon import Daemon, serving
from expertd_testing.fake_device import FakeDevice
from expertstore.pack.manifest import read_manifest
from tests.inference.device.stepping import ROOM, greedy_by
from tests.inference.greedy import greedy, prompt_of

Make = Callable[..., Any]
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is for hosts without a GPU"
)
NUM_TOKENS = 8
PROMPT = prompt_of(9)


@pytest.fixture(scope="module")
def pack(packed: Make) -> Path:
    path: Path = packed("mixtral")
    return path


@pytest.fixture(scope="module")
def expected(pack: Path) -> list[int]:
    with serving({"m": pack}) as daemon, float32_worker(daemon) as worker:
        return greedy(worker.model, PROMPT, NUM_TOKENS)


def worker_of(daemon: Daemon, mode: DecodeGraphsMode, **settings: Any) -> Worker:
    device = DeviceSettings(device="fake", decode_graphs=mode, **settings)
    return float32_worker(daemon, device=device, say=lambda _: None)


def float32_worker(daemon: Daemon, **arguments: Any) -> Worker:
    # Recorded steps round otherwise, which in bfloat16 may choose another token.
    return Worker(attach("m", daemon.socket), dtype=torch.float32, **arguments)


def tokens_of(executor: Executor) -> list[int]:
    return greedy_by(executor, PROMPT, NUM_TOKENS)


def replays(worker: Worker) -> int:
    assert isinstance(worker._runner, DeviceGroup)
    return worker._runner.num_replays


@interpreted
@pytest.mark.parametrize("mode", [DecodeGraphsMode.SEGMENTS, DecodeGraphsMode.WHOLE])
def test_the_text_is_the_same(mode: DecodeGraphsMode, pack: Path, expected: list[int]) -> None:
    with serving({"m": pack}) as daemon, worker_of(daemon, mode) as worker:
        executor = worker.open_executor(ROOM)
        # The second prompt finds a device that has been used by itself meanwhile.
        assert [tokens_of(executor) for _ in range(2)] == [expected] * 2
        assert replays(worker) == 2 * (NUM_TOKENS - 1)
        stats = worker.device_stats
        assert stats is not None
        assert (stats.arena, stats.steps) == ("registered", mode.value)
        assert stats.device_hits
        if mode is DecodeGraphsMode.WHOLE:
            # One look per step, apart from the prompts.
            num_layers = len(worker.manifest.layers)
            assert stats.syncs <= 2 * (NUM_TOKENS - 1) + 4 * num_layers


@interpreted
def test_from_a_daemon_that_has_too_little_ram(pack: Path, expected: list[int]) -> None:
    manifest = read_manifest(pack).manifest
    ram = 2 * manifest.working_set_bytes
    with (
        serving({"m": pack}, ram=ram) as daemon,
        worker_of(daemon, DecodeGraphsMode.WHOLE, speculate_layers=0) as worker,
    ):
        assert tokens_of(worker.open_executor(ROOM)) == expected
        assert replays(worker)
        stats = worker.device_stats
        assert stats is not None
        assert stats.nvme_misses
        # Nothing is held once a step is over.
        worker.session.acquire(manifest.layers[0].layer, [0]).release()


def test_a_small_cache_has_segments_and_says_so(pack: Path, expected: list[int]) -> None:
    manifest = read_manifest(pack).manifest
    said: list[str] = []
    settings = DeviceSettings(
        device="fake",
        decode_graphs=DecodeGraphsMode.WHOLE,
        cache_bytes=manifest.max_record_bytes * (2 * len(manifest.layers) - 1),
        speculate_layers=0,
    )
    with (
        serving({"m": pack}) as daemon,
        float32_worker(daemon, device=settings, say=said.append) as worker,
    ):
        assert tokens_of(worker.open_executor(ROOM)) == expected
        assert replays(worker)
    assert len(said) == 1
    assert "less than one token's experts" in said[0]


@interpreted
def test_a_daemon_that_is_killed_and_comes_back(pack: Path, expected: list[int]) -> None:
    with serving({"m": pack}) as first, worker_of(first, DecodeGraphsMode.WHOLE) as worker:
        executor = worker.open_executor(ROOM)
        assert tokens_of(executor) == expected
        step = executor.forward
        calls = []

        def killing(batch: Batch) -> torch.Tensor:
            calls.append(1)
            if len(calls) == 5:
                first.kill()
                thread.start()
            return step(batch)

        executor.forward = killing  # type: ignore[method-assign]
        done = threading.Event()

        def serve_again() -> None:
            with serving({"m": pack}, socket=first.socket):
                done.wait(60)

        thread = threading.Thread(target=serve_again)
        try:
            assert tokens_of(executor) == expected
        finally:
            done.set()
            thread.join()
        device = worker._runner.devices[0]  # type: ignore[union-attr]
        assert isinstance(device, FakeDevice)
        assert [memory.closed for memory in device.memory] == [True, False]


def test_several_devices_are_not_recorded(pack: Path, expected: list[int]) -> None:
    said: list[str] = []
    settings = DeviceSettings(device="fake:0,fake:1", decode_graphs=DecodeGraphsMode.SEGMENTS)
    with (
        serving({"m": pack}) as daemon,
        float32_worker(daemon, device=settings, say=said.append) as worker,
    ):
        executor = worker.open_executor(ROOM)
        assert executor.name == "modules"
        assert tokens_of(executor) == expected
    assert len(said) == 1
    assert "several devices" in said[0]
