"""A worker on fake devices, against a real daemon."""

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd_client import Client
from expertd_inference import Engine, EngineLimits, GenerationSettings, Worker
from expertd_inference import worker as worker_module
from expertd_inference.device import group
from expertd_inference.process.attachment import attach
from expertd_inference.settings import DecodeGraphsMode, DeviceSettings, OnMiss
from expertd_testing.daemon import Daemon, serving
from expertd_testing.fake_device import FakeDevice
from expertd_testing.watching import eventually
from expertstore.errors import DeviceLostError, InvalidInputError, PackError
from expertstore.sizes import parse_bytes, size_to_give
from tests.inference.device.stepping import ROOM, greedy_by
from tests.inference.greedy import greedy, prompt_of

Make = Callable[..., Any]
PROMPT = prompt_of(24, seed=1)


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> list[FakeDevice]:
    """The devices that workers have opened."""
    opened: list[FakeDevice] = []
    real = group.open_device

    def opening(name: str, say: Any = None) -> Any:
        device = real(name, say)
        assert isinstance(device, FakeDevice)
        opened.append(device)
        return device

    monkeypatch.setattr(group, "open_device", opening)
    return opened


def worker_of(daemon: Daemon, model: str = "m", **settings: Any) -> Worker:
    return Worker(attach(model, daemon.socket), device=DeviceSettings(device="fake", **settings))


def record_bytes(pack: Path) -> int:
    layouts = json.loads((pack / "pack.json").read_text())["layouts"]
    return max(layout["record_bytes"] for layout in layouts)


def exact_worker(daemon: Daemon, **settings: Any) -> Worker:
    device = DeviceSettings(device="fake", **settings)
    return Worker(attach("m", daemon.socket), device=device, exact=True)


@pytest.fixture(scope="module")
def pack(packed: Make) -> Path:
    path: Path = packed("mixtral")
    return path


@pytest.fixture(scope="module")
def roomy(pack: Path) -> Iterator[Daemon]:
    with serving({"m": pack}) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def expected(stock: Make) -> list[int]:
    return greedy(stock("mixtral"), PROMPT, 16)


@pytest.mark.parametrize("on_miss", [OnMiss.COPY, OnMiss.AUTO])
@pytest.mark.parametrize("num_records", [6, 12, 24])
def test_tokens_of_stock_from_any_budget(
    num_records: int, on_miss: OnMiss, pack: Path, expected: list[int]
) -> None:
    size = record_bytes(pack)
    with (
        serving({"m": pack}, ram=num_records * size) as daemon,
        worker_of(daemon, cache_bytes=7 * size, on_miss=on_miss) as worker,
    ):
        assert greedy(worker.model, PROMPT, 16) == expected
        stats = worker.device_stats
        assert stats is not None
        assert (stats.nvme_misses > 24) == (num_records < 24)


@pytest.mark.parametrize(
    "device",
    [
        DeviceSettings(),
        DeviceSettings(device="fake", on_miss=OnMiss.COPY),
        DeviceSettings(device="fake", on_miss=OnMiss.AUTO),
    ],
    ids=["cpu", "copied", "shared with the cpu"],
)
def test_tokens_of_stock_where_no_slot_is_to_be_had(
    pack: Path, expected: list[int], device: DeviceSettings
) -> None:
    """Pinned or leased is all, for as long as it takes."""
    size = record_bytes(pack)
    with (
        serving({"m": pack}, ram=10 * size) as daemon,
        Client(daemon.socket) as store,
        store.attach("m") as pinner,
        store.attach("m") as holder,
    ):
        pinner.pin([(0, expert) for expert in range(4)])
        with (
            holder.acquire(1, range(6)),
            Worker(attach("m", daemon.socket), device=device) as worker,
        ):
            assert greedy(worker.model, PROMPT, 16) == expected
            assert worker.session.pack_reads > 0
        assert holder.connected


@pytest.mark.parametrize("mode", [DecodeGraphsMode.SEGMENTS, DecodeGraphsMode.OFF])
def test_many_sequences_share_an_engine(mode: DecodeGraphsMode, pack: Path, stock: Make) -> None:
    """With too few blocks for all and half of the experts in RAM, each has its text alone."""
    size = record_bytes(pack)
    settings = DeviceSettings(
        device="fake", cache_bytes=9 * size, on_miss=OnMiss.COPY, decode_graphs=mode
    )
    prompts = [prompt_of(length, seed=length) for length in (62, 63, 30)]
    with (
        serving({"m": pack}, ram=12 * size) as daemon,
        Worker(attach("m", daemon.socket), device=settings, dtype=torch.float32) as worker,
        Engine(worker, EngineLimits(max_sequences=4, kv_tokens=3 * 64)) as engine,
    ):
        wanted = GenerationSettings(max_new_tokens=12, ignore_eos=True)
        done = engine.generate(prompts, wanted)
        stats = engine.stats
    model = stock("mixtral", torch.float32)
    for prompt, one in zip(prompts, done, strict=True):
        assert [token.id for token in one.tokens] == greedy(model, prompt, 12)
    assert stats.executor == ("modules" if mode is DecodeGraphsMode.OFF else "graphs")
    assert stats.rows_mean > 1.5
    assert stats.num_preemptions > 0


def test_what_moved_is_in_the_result(roomy: Daemon, pack: Path) -> None:
    with worker_of(
        roomy,
        cache_bytes=12 * record_bytes(pack),
        on_miss=OnMiss.COPY,
        decode_graphs=DecodeGraphsMode.OFF,
    ) as worker:
        executor = worker.open_executor(ROOM)
        prompt = prompt_of(7)
        greedy_by(executor, prompt, 4)
        before, hits = worker.device_stats, worker.session.host_hits
        greedy_by(executor, prompt, 8)
        assert before is not None
        moved = worker.device_stats.since(before)  # type: ignore[union-attr]
        # 7 forward passes of one token by 3 layers of 2 experts, and the prefill's.
        assert moved.device_hits + moved.host_hits + moved.nvme_misses + moved.prefetch_useful > 42
        assert moved.bytes_copied == moved.copies * record_bytes(pack)
        assert moved.copies == moved.host_hits + moved.nvme_misses + moved.prefetch_issued
        assert 3 * 8 <= moved.syncs <= 4 * 8 + moved.nvme_misses
        assert worker.session.host_hits > hits


def test_a_session_holds_nothing_between_steps(roomy: Daemon) -> None:
    with worker_of(roomy) as worker:
        greedy(worker.model, PROMPT, 2)
        worker.session.acquire(0, [0]).release()


def test_a_cut_off_worker_repeats_the_step(
    pack: Path, fakes: list[FakeDevice], tmp_path: Path
) -> None:
    """It stands still in the midst of a step, holding, while another wants all the room."""
    config = tmp_path / "config.toml"
    config.write_text("stall_seconds = 0.5\n")
    size = record_bytes(pack)
    with (
        serving({"m": pack}, ram=8 * size, config=config) as daemon,
        worker_of(daemon, cache_bytes=7 * size, on_miss=OnMiss.COPY) as worker,
        Client(daemon.socket) as store,
        store.attach("m") as other,
    ):
        executor = worker.open_executor(ROOM)
        expected = greedy_by(executor, PROMPT, 16)
        (device,) = fakes
        real, sessions = device.to_host, []

        def to_host(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
            found = worker._runner.transaction.hold._lease is not None  # type: ignore[union-attr]
            if found and len(sessions) < 3:
                sessions.append(worker.session.id)
                for lease in other.waves(2, range(8), timeout_seconds=20, in_arena=True):
                    lease.release()
            return real(*tensors)

        device.to_host = to_host  # type: ignore[method-assign]
        assert greedy_by(executor, PROMPT, 16) == expected
        assert len(sessions) == 3
        assert worker.session.id not in sessions, "it has attached again"


def test_a_daemon_that_is_killed_and_comes_back(
    pack: Path, expected: list[int], fakes: list[FakeDevice], tmp_path: Path
) -> None:
    size = record_bytes(pack)
    with serving({"m": pack}) as first:
        said: list[str] = []
        worker = Worker(
            attach("m", first.socket),
            device=DeviceSettings(device="fake", cache_bytes=7 * size),
            say=said.append,
        )
        with worker:
            assert greedy(worker.model, PROMPT, 16) == expected
            first.kill()

            def serve_again() -> None:
                time.sleep(0.2)
                with serving({"m": pack}, socket=first.socket):
                    done.wait(60)

            done = threading.Event()
            thread = threading.Thread(target=serve_again)
            thread.start()
            try:
                assert greedy(worker.model, PROMPT, 16) == expected
            finally:
                done.set()
                thread.join()
            assert said == ["daemon gone, waiting to re-attach", "re-attached"]
            (device,) = fakes
            assert [memory.closed for memory in device.memory] == [True, False]
        assert all(memory.closed for memory in device.memory)


def test_a_device_that_vanishes_ends_the_session_alone(
    roomy: Daemon, expected: list[int], fakes: list[FakeDevice]
) -> None:
    with worker_of(roomy) as worker, worker_of(roomy) as other:
        greedy(worker.model, PROMPT, 4)
        fakes[0].lose()
        with pytest.raises(DeviceLostError, match=r"fake does not answer.*--device"):
            greedy(worker.model, PROMPT, 4)
        assert worker.session.connected
        assert greedy(other.model, PROMPT, 16) == expected


def test_the_cache_leaves_room_for_keys_and_values(roomy: Daemon) -> None:
    for limits, num_tokens in ((None, 512), (EngineLimits(kv_tokens=640), 640)):
        with Worker(
            attach("m", roomy.socket), device=DeviceSettings(device="fake"), limits=limits
        ) as worker:
            assert worker.kv_bytes == num_tokens * worker.kv_bytes_per_token
    limits = EngineLimits(kv_tokens=1 << 40)  # more than the device has
    with pytest.raises(InvalidInputError, match="are for keys and values"):
        Worker(attach("m", roomy.socket), device=DeviceSettings(device="fake"), limits=limits)


def test_a_budget_below_a_layer_s_need_is_refused_at_the_door(roomy: Daemon, pack: Path) -> None:
    size = record_bytes(pack)
    advice = f"give {size_to_give(6 * size)} or more"
    with pytest.raises(InvalidInputError, match=rf"2 experts.*4 staging.*{advice}"):
        worker_of(roomy, cache_bytes=5 * size)
    worker_of(roomy, cache_bytes=parse_bytes(size_to_give(6 * size))).close()
    with pytest.raises(InvalidInputError, match="no device 'tpu'"):
        Worker(attach("m", roomy.socket), device=DeviceSettings(device="tpu"))


def test_users_are_offered_no_fake(monkeypatch: pytest.MonkeyPatch) -> None:
    """The tests' own device is there for them alone."""
    monkeypatch.delitem(group.DEVICE_KINDS, "fake")
    with pytest.raises(InvalidInputError, match=r"no device 'fake:0'; give cpu, or such as cuda:0"):
        group.open_device("fake:0")


@pytest.mark.parametrize("at", ["load_trunk", "refuse_in_forks", "DeviceGroup"])
def test_a_worker_that_cannot_be_made_leaves_nothing(
    at: str, roomy: Daemon, fakes: list[FakeDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*_: Any, **__: Any) -> None:
        raise PackError("no")

    monkeypatch.setattr(worker_module, at, fails)
    settings = None if at == "refuse_in_forks" else DeviceSettings(device="fake:0,fake:1")
    closed: list[FakeDevice] = []
    monkeypatch.setattr(FakeDevice, "close", lambda self: closed.append(self))
    with Client(roomy.socket) as store:
        before = len(store.stats()["sessions"])
        with pytest.raises(PackError, match="no"):
            Worker(attach("m", roomy.socket), device=settings)
        eventually(lambda: len(store.stats()["sessions"]) == before)
    assert {id(device) for device in closed} == {id(device) for device in fakes}
    assert len(fakes) == (0 if settings is None else 2)


def test_a_second_device_that_cannot_be_opened_closes_the_first(
    roomy: Daemon, fakes: list[FakeDevice], monkeypatch: pytest.MonkeyPatch
) -> None:
    closed: list[FakeDevice] = []
    monkeypatch.setattr(FakeDevice, "close", lambda self: closed.append(self))
    with pytest.raises(InvalidInputError, match="no device 'tpu'"):
        Worker(attach("m", roomy.socket), device=DeviceSettings(device="fake:0,tpu"))
    assert closed == fakes
    assert len(fakes) == 1


def test_a_runner_that_fails_to_close_ends_the_session_all_the_same(
    roomy: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    with Client(roomy.socket) as store:
        worker = Worker(attach("m", roomy.socket))
        number = worker.session.id
        with monkeypatch.context() as patch:
            patch.setattr(worker._runner, "close", lambda: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                worker.close()
        eventually(lambda: number not in {each["id"] for each in store.stats()["sessions"]})


def test_exact_computes_no_expert_on_the_cpu(pack: Path, roomy: Daemon) -> None:
    settings = GenerationSettings(max_new_tokens=8)
    with exact_worker(roomy, cache_bytes=7 * record_bytes(pack)) as worker:
        worker.engine.generate([PROMPT[:4]], settings)
        assert worker.device_stats is not None
        assert worker.device_stats.host_hits > 0
        assert worker.device_stats.cpu_computed == 0
        assert worker.engine.executor == "modules"


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"on_miss": OnMiss.CPU}, "--on-miss cpu.*give --on-miss copy"),
        ({"decode_graphs": DecodeGraphsMode.SEGMENTS}, "--decode-graphs segments.*leave out one"),
        ({"decode_graphs": DecodeGraphsMode.WHOLE}, "--decode-graphs whole.*leave out one"),
    ],
)
def test_what_is_not_exact_is_refused(
    settings: dict[str, Any], words: str, fakes: list[FakeDevice], roomy: Daemon
) -> None:
    with pytest.raises(InvalidInputError, match=words):
        exact_worker(roomy, **settings)
    assert not fakes
    # Nothing of this is about a worker without a device.
    Worker(attach("m", roomy.socket), device=DeviceSettings(**settings), exact=True).close()
