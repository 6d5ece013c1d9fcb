"""The device runner on fakes: the CPU's answer, whatever is where and comes when."""

from collections.abc import Callable
from typing import Any

import pytest
import torch

from expertd_inference.device.fake import FakeDevice, FakeSpeed
from expertd_inference.settings import CachePolicy, OnMiss
from tests.inference.device.held_source import HeldPackSource
from tests.inference.device.rig import make_rig
from tests.inference.greedy import greedy, prompt_of

Make = Callable[..., Any]
PROMPT = prompt_of(24, seed=1)
NUM_TOKENS = 12

LATE = FakeSpeed(delay_seconds=2e-4, num_engines=3)
"""Copies that arrive late and out of order."""


@pytest.fixture(scope="module")
def expected(stock: Make) -> Callable[[str], list[int]]:
    return lambda architecture: greedy(stock(architecture), PROMPT, NUM_TOKENS)


@pytest.mark.parametrize("seed", [1, 2])
@pytest.mark.parametrize("on_miss", list(OnMiss))
@pytest.mark.parametrize(
    ("num_slots", "settings"),
    [
        pytest.param(6, {}, id="a token's need of one layer"),
        pytest.param(2, {"speculate_layers": 0}, id="nothing but that"),
        pytest.param(14, {"speculate_layers": 2, "cache_policy": CachePolicy.AGED}, id="half"),
        pytest.param(15, {"speculate_layers": 2, "speculate_experts": 4}, id="many guesses"),
        pytest.param(24, {}, id="all"),
        pytest.param(None, {}, id="automatic"),
    ],
)
def test_tokens_of_stock(
    num_slots: int | None,
    settings: dict[str, Any],
    on_miss: OnMiss,
    seed: int,
    packed: Make,
    expected: Callable[[str], list[int]],
) -> None:
    source = HeldPackSource(packed("mixtral"))
    device = FakeDevice(speed=LATE, seed=seed)
    rig = make_rig(source, device, num_slots=num_slots, on_miss=on_miss, **settings)
    assert greedy(rig.model, PROMPT, NUM_TOKENS) == expected("mixtral")
    assert source.lease is None, "all is given back at a step's end"
    assert not torch.isnan(rig.logits(PROMPT)).any()
