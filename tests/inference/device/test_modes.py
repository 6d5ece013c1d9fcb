"""How the arena is read and how steps run is chosen, said once and shown in the results."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

from expertd_inference import Worker
from expertd_inference.device import group
from expertd_inference.device.stats import DeviceStats
from expertd_inference.device.whole_choice import MIN_WHOLE_LINK
from expertd_inference.process.attachment import attach
from expertd_inference.settings import DecodeGraphsMode, DeviceSettings, OnMiss
from expertd_testing.daemon import Daemon, serving
from expertd_testing.fake_device import FakeDevice, FakeSpeed
from expertstore.pack.manifest import read_manifest
from tests.inference.device.stepping import ROOM, greedy_by
from tests.inference.greedy import prompt_of

Make = Callable[..., Any]
pytestmark = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is for hosts without a GPU"
)
PROMPT = prompt_of(7)
REFUSED = "the GPU's driver does not register"
GRANTED = "the GPU's driver registers 32.0 KiB of"


class Case(NamedTuple):
    """A device and what is asked of it, and what comes of that."""

    arena: str
    steps: str
    said: tuple[str, ...] = ()
    mode: DecodeGraphsMode = DecodeGraphsMode.AUTO
    device: str = "fake:0"
    make: dict[str, Any] = {}  # noqa: RUF012 - never changed
    settings: dict[str, Any] = {}  # noqa: RUF012


CASES = {
    "a mapped arena": Case("registered", "whole"),
    "a slow link": Case(
        "registered", "segments",
        make={"speed": FakeSpeed(link_bytes_per_second=MIN_WHOLE_LINK / 2)},
    ),
    "a slow link that is measured for this alone": Case(
        "registered", "segments",
        make={"speed": FakeSpeed(link_bytes_per_second=MIN_WHOLE_LINK / 2)},
        settings={"on_miss": OnMiss.COPY},
    ),
    "a small cache": Case("registered", "segments", settings={"cache_bytes": 5}),
    "a driver that refuses": Case("staged", "segments", (REFUSED,), make={"registers": False}),
    "one that grants a part": Case(
        "partial", "segments", (GRANTED,), make={"max_registered_bytes": 32 << 10}
    ),
    "one that refuses what was asked for": Case(
        "staged", "segments", (REFUSED, "the GPU cannot find experts by itself"),
        mode=DecodeGraphsMode.WHOLE, make={"registers": False},
    ),
    "two devices": Case("registered", "off", device="fake:0,fake:1"),
    "none wanted": Case("registered", "off", mode=DecodeGraphsMode.OFF),
}  # fmt: skip


@pytest.fixture(scope="module")
def pack(packed: Make) -> Path:
    path: Path = packed("mixtral")
    return path


@pytest.fixture(scope="module")
def daemon(pack: Path) -> Iterator[Daemon]:
    with serving({"m": pack}) as served:
        yield served


@pytest.mark.parametrize("name", list(CASES))
def test_chosen_said_and_shown(
    name: str, daemon: Daemon, pack: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, said = CASES[name], list[str]()

    def open_device(device_name: str, say: Callable[[str], None]) -> FakeDevice:
        device = FakeDevice(device_name, **case.make, say=say)
        device.hardware = name  # rates are remembered by it
        return device

    monkeypatch.setattr(group, "open_device", open_device)
    settings = case.settings
    if records := settings.get("cache_bytes"):
        size = read_manifest(pack).manifest.max_record_bytes
        settings = {"cache_bytes": records * size, "speculate_layers": 0}
    device = DeviceSettings(device=case.device, decode_graphs=case.mode, **settings)
    with Worker(attach("m", daemon.socket), device=device, say=said.append) as worker:
        executor = worker.open_executor(ROOM)
        greedy_by(executor, PROMPT, 4)
        # Attaching anew is no reason to say it again.
        worker.session.reattach(5)
        greedy_by(executor, PROMPT, 4)
        stats = worker.device_stats
        assert stats is not None
        executor.close()
    assert (stats.arena, stats.steps) == (case.arena, case.steps)
    assert executor.name == ("modules" if case.steps == "off" else "graphs")
    assert len(said) == len(case.said), said
    assert all(one.startswith(other) for one, other in zip(said, case.said, strict=True))


def test_of_a_generation_the_counts_are_its_own_and_the_modes_are_the_worker_s() -> None:
    before, now = DeviceStats(copies=1), DeviceStats(copies=3, arena="staged", steps="whole")
    assert now.since(before) == DeviceStats(copies=2, arena="staged", steps="whole")
