"""No attention of ours is cuDNN's, and torch's switch is afterwards what it was."""

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch

from expertd_inference.device.attention import without_cudnn_attention
from expertd_inference.device.graphs import DecodeCache
from expertd_inference.settings import DecodeGraphsMode
from tests.inference.device.held_source import HeldPackSource
from tests.inference.device.rig import make_rig
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
    """The prompt's, and those of steps that are run, recorded and replayed."""
    rig = make_rig(HeldPackSource(packed("mixtral")), decode_graphs=DecodeGraphsMode.SEGMENTS)
    real, seen = torch.nn.functional.scaled_dot_product_attention, []

    def attention(*args: Any, **kwargs: Any) -> torch.Tensor:
        seen.append(is_on())
        return real(*args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", attention)
    cache, ids = DecodeCache(rig.model.config, 32), torch.tensor([prompt_of(5)])
    for _ in range(4):
        with torch.no_grad():
            rig.model(input_ids=ids, past_key_values=cache, use_cache=True)
        assert is_on() is before
        ids = ids[:, :1]
    # Of the last step nothing runs but what was recorded.
    assert seen == [False] * 3 * len(rig.source.manifest.layers)
