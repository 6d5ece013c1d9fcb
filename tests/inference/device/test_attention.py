"""No attention of ours is cuDNN's, and torch's switch is afterwards what it was."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from expertd_inference.device.attention import without_cudnn_attention
from expertd_inference.execution import graph_rows
from expertd_inference.execution.on_device import device_executor
from expertd_inference.settings import DecodeGraphsMode
from tests.inference.device.held_source import HeldPackSource
from tests.inference.device.rig import make_rig
from tests.inference.device.stepping import ROOM, greedy_by
from tests.inference.greedy import prompt_of

Make = Callable[..., Any]
is_on = torch.backends.cuda.cudnn_sdp_enabled


@pytest.fixture(autouse=True, params=[True, False], ids=["on", "off"])
def before(request: pytest.FixtureRequest) -> Iterator[bool]:
    """What the process has it at."""
    was = is_on()
    torch.backends.cuda.enable_cudnn_sdp(request.param)
    yield request.param
    torch.backends.cuda.enable_cudnn_sdp(was)


def test_it_is_off_inside_and_then_what_it_was(before: bool) -> None:
    def fails() -> None:
        with without_cudnn_attention(), without_cudnn_attention():
            assert not is_on()
            raise KeyError

    with pytest.raises(KeyError):
        fails()
    assert is_on() is before


def test_one_thread_does_not_put_it_back_beneath_another(before: bool) -> None:
    inside, leave, seen = threading.Event(), threading.Event(), []

    def other() -> None:
        with without_cudnn_attention():
            inside.set()
            leave.wait(60)
            seen.append(is_on())

    thread = threading.Thread(target=other)
    with without_cudnn_attention():
        thread.start()
        assert inside.wait(60)
    seen.append(is_on())
    leave.set()
    thread.join()
    assert seen == [False, False]
    assert is_on() is before


def test_every_attention_of_a_model_is_without(
    packed: Make, before: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of steps that are tried and recorded; nothing else runs when they are replayed."""
    rig = make_rig(
        HeldPackSource(packed("mixtral")), decode_graphs=DecodeGraphsMode.SEGMENTS, stepped=False
    )
    real, seen = graph_rows._attend, []

    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(is_on())
        return real(*args, **kwargs)

    monkeypatch.setattr(graph_rows, "_attend", attention)
    executor = device_executor(rig.model, rig.group, ROOM, 64, [].append)
    assert executor.name == "graphs"
    assert len(seen) >= 2 * len(rig.source.manifest.layers)
    num_recorded = len(seen)
    greedy_by(executor, prompt_of(5), 4)
    assert rig.group.num_replays == 3
    assert len(seen) == num_recorded
    assert not any(seen)
    assert is_on() is before
