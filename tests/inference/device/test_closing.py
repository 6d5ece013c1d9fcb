"""A worker that is closed gives its device all memory back, whoever still holds its model."""

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd_inference import Worker
from expertd_inference.device import group
from expertd_inference.execution.graphs import GraphsExecutor
from expertd_inference.process.attachment import attach
from expertd_inference.settings import DecodeGraphsMode, DeviceSettings
from expertd_testing.daemon import Daemon, serving
from expertd_testing.fake_device import FakeDevice
from expertstore.errors import PreconditionError
from tests.inference.device.stepping import ROOM, greedy_by
from tests.inference.greedy import prompt_of

Make = Callable[..., Any]
interpreted = pytest.mark.skipif(
    torch.cuda.is_available(), reason="Triton's interpreter is for hosts without a GPU"
)


@pytest.fixture(scope="module")
def daemon(packed: Make) -> Iterator[Daemon]:
    pack: Path = packed("mixtral")
    with serving({"m": pack}) as served:
        yield served


@pytest.fixture
def no_collector() -> Iterator[None]:
    """What only the collector of cycles would free is not given back in time."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


class Watched:
    """Notes the tensors that torch's allocator would get back, as they are made."""

    def __init__(self) -> None:
        self.kept: dict[str, Any] = {}

    def add(self, name: str, thing: Any) -> None:
        self.kept[name] = weakref.ref(thing)

    @property
    def alive(self) -> set[str]:
        return {name for name, thing in self.kept.items() if thing() is not None}


@interpreted
@pytest.mark.parametrize(
    "mode", [DecodeGraphsMode.OFF, DecodeGraphsMode.SEGMENTS, DecodeGraphsMode.WHOLE]
)
@pytest.mark.usefixtures("no_collector")
def test_nothing_is_kept(
    mode: DecodeGraphsMode, daemon: Daemon, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched, device = Watched(), FakeDevice()
    monkeypatch.setattr(group, "open_device", lambda name, say: device)
    worker = Worker(
        attach("m", daemon.socket),
        device=DeviceSettings(device="fake", decode_graphs=mode, speculate_layers=1),
    )
    executor = worker.open_executor(ROOM)
    greedy_by(executor, prompt_of(9), 6)
    model, runner = worker.model, worker._runner
    assert isinstance(runner, group.DeviceGroup)
    watched.add("slots", device._allocated[0])
    for name, parameter in model.named_parameters():
        watched.add(name, parameter)
    if isinstance(executor, GraphsExecutor):
        recorded = next(iter(executor._steps.values()))
        watched.add("logits", recorded.logits)
        watched.add("steps", recorded)
        watched.add("keys", executor._modules.memory.keys[0])
        del recorded
    assert len(watched.alive) == len(watched.kept) > 10
    # Generating leaves cycles of transformers' behind.
    gc.collect()
    experts = model.model.layers[0].mlp.experts
    routed = torch.zeros(1, 128), torch.tensor([[0, 1]]), torch.ones(1, 2)
    del parameter
    executor.close()
    worker.close()
    assert not watched.alive
    assert all(memory.closed for memory in device.memory)
    worker.close()
    with pytest.raises(PreconditionError, match="closed"):
        model(torch.tensor([[1, 2]]))
    with pytest.raises(PreconditionError, match="closed"):
        experts(*routed)
    # What it did is still to be asked.
    stats = worker.device_stats
    assert stats is not None
    assert stats.copies
    assert stats.steps == mode.value
