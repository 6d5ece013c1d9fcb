"""The device runner on fakes: the CPU's answer, whatever is where and comes when."""

import random
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from expertd_inference.device import runner
from expertd_inference.device.transaction import StepLostError
from expertd_inference.execution.on_device import device_executor
from expertd_inference.experts.cpu import connect
from expertd_inference.experts.recovery import MAX_FUTILE_RECOVERIES, Recovery
from expertd_inference.model.loading import load_trunk
from expertd_inference.settings import CachePolicy, DecodeGraphsMode, OnMiss
from expertd_testing.fake_device import FakeDevice, FakeSpeed
from expertstore.errors import (
    DeviceLostError,
    DeviceMemoryError,
    PreconditionError,
    SessionLostError,
    UnavailableError,
)
from tests.inference.device.held_source import HeldPackSource
from tests.inference.device.rig import make_rig
from tests.inference.device.stepping import ROOM, greedy_by
from tests.inference.greedy import greedy, prompt_of
from tests.inference.pack_source import PackSource

Make = Callable[..., Any]
PROMPT = prompt_of(24, seed=1)
NUM_TOKENS = 12

LATE = FakeSpeed(delay_seconds=2e-4, num_engines=3)
"""Copies that arrive late and out of order."""


@pytest.fixture(scope="module")
def expected(stock: Make) -> Callable[[str], list[int]]:
    return lambda architecture: greedy(stock(architecture), PROMPT, NUM_TOKENS)


@pytest.mark.parametrize(
    ("on_miss", "seed"), [(on_miss, seed) for seed, on_miss in enumerate(OnMiss)]
)
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


@pytest.mark.parametrize("architecture", ["gpt_oss", "deepseek_v3", "qwen2_moe"])
def test_tokens_of_the_cpu_worker(architecture: str, packed: Make) -> None:
    """Biases and interleaved gates, a dense first layer, a dense layer in between."""
    from_cpu = PackSource(packed(architecture, "4bit"))
    trunk = load_trunk(from_cpu.pack, from_cpu.manifest)
    connect(trunk.experts, from_cpu.manifest, from_cpu, Recovery(from_cpu, reattach_seconds=1))
    expected = greedy(trunk.model, PROMPT, NUM_TOKENS)
    device = FakeDevice(speed=LATE)
    rig = make_rig(HeldPackSource(from_cpu.pack), device, num_slots=8, speculate_layers=2)
    assert greedy(rig.model, PROMPT, NUM_TOKENS) == expected
    assert rig.group.stats.prefetch_useful > 0


def test_blocks_of_a_long_prompt(packed: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(HeldPackSource(packed("mixtral")), num_slots=12, dtype=torch.float32)
    prompt = prompt_of(50)
    whole = rig.logits(prompt)
    # 2 slots of 128 float32 per token: blocks of 16 tokens, the last of 2.
    monkeypatch.setattr(runner, "MAX_SLOT_BYTES", 16 * 2 * 128 * 4)
    # Not equal: a matrix product of other shape adds in another order.
    assert torch.allclose(rig.logits(prompt), whole, atol=1e-4)


def test_a_batch_equals_its_rows(packed: Make) -> None:
    rig = make_rig(HeldPackSource(packed("mixtral")), num_slots=12, dtype=torch.float32)
    rows = [prompt_of(20, seed=seed) for seed in range(3)]
    with torch.no_grad():
        together = rig.model(torch.tensor(rows)).logits
    for row, expected in zip(rows, together, strict=True):
        assert torch.allclose(rig.logits(row)[0], expected, atol=1e-4)


@pytest.mark.parametrize("num_rows", [1, 5, 40])
def test_exact_rows_do_not_depend_on_others(num_rows: int, packed: Make) -> None:
    settings = {"num_slots": 12, "dtype": torch.float32, "on_miss": OnMiss.COPY}
    rig = make_rig(HeldPackSource(packed("mixtral")), exact=True, **settings)
    experts = rig.model.model.layers[0].mlp.experts
    generator = torch.Generator().manual_seed(num_rows)
    rows = torch.randn(40, 128, generator=generator)
    index = torch.rand(40, 8, generator=generator).argsort(1)[:, :2]
    weights = torch.rand(40, 2, generator=generator)
    together = experts(rows, index, weights)
    parts = (x.split(num_rows) for x in (rows, index, weights))
    assert torch.equal(torch.cat([experts(*part) for part in zip(*parts, strict=True)]), together)


def test_threads_take_turns(packed: Make) -> None:
    # The source asserts that no lease is taken while another is held.
    rig = make_rig(HeldPackSource(packed("mixtral")), num_slots=8)
    prompts = [prompt_of(30, seed=seed) for seed in range(3)]
    expected = [rig.logits(prompt) for prompt in prompts]
    results: dict[int, torch.Tensor] = {}
    threads = [
        threading.Thread(target=lambda n=n: results.update({n: rig.logits(prompts[n])}))
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[n], expected[n]) for n in range(3))


def test_nan_is_passed_on(packed: Make) -> None:
    rig = make_rig(HeldPackSource(packed("mixtral")), num_slots=8)
    hidden = torch.full((2, 128), torch.nan, dtype=torch.bfloat16)
    index, weights = torch.tensor([[0, 1], [5, 0]]), torch.ones(2, 2, dtype=torch.bfloat16)
    experts = rig.model.model.layers[1].mlp.experts
    assert experts(hidden, index, weights).isnan().all()
    assert not experts(torch.zeros_like(hidden), index, weights).isnan().any()
    assert rig.source.lease is None, "a layer that is called alone is a step"


def test_none_experts_are_left_out(packed: Make) -> None:
    rig = make_rig(HeldPackSource(packed("mixtral")), num_slots=8)
    hidden = torch.randn(2, 128, dtype=torch.bfloat16)
    experts = rig.model.model.layers[0].mlp.experts
    weights = torch.ones(2, 2, dtype=torch.bfloat16)
    some = experts(hidden, torch.tensor([[8, 1], [8, 8]]), weights)
    assert some[0].abs().sum() > 0
    assert some[1].abs().sum() == 0


# What ends in the middle


@pytest.mark.parametrize("seed", range(2))
def test_an_interrupt_anywhere_leaves_nothing_half_done(
    seed: int, packed: Make, stock: Make
) -> None:
    """Ctrl-C at any call of the device: what was under way is not taken for arrived."""
    source = HeldPackSource(packed("mixtral"))
    device = FakeDevice(speed=LATE, seed=seed)
    rig = make_rig(source, device, num_slots=9)
    expected = stock("mixtral")(torch.tensor([PROMPT])).logits
    real, random_ = device.call, random.Random(seed)
    left = 0

    def call() -> None:
        nonlocal left
        left -= 1
        if left == 0:
            raise KeyboardInterrupt
        real()

    device.call = call  # type: ignore[method-assign]
    num_interrupted = 0
    for _ in range(25):
        left = random_.randrange(20, 400)
        try:
            rig.logits(PROMPT)
        except KeyboardInterrupt:
            num_interrupted += 1
        left = 0
        assert source.lease is None
        assert torch.equal(rig.logits(PROMPT), expected)
    assert num_interrupted > 5


def test_a_session_lost_in_the_midst_of_a_layer(packed: Make, stock: Make) -> None:
    """The daemon takes the bytes back while they are copied: the layer is repeated."""
    prompt = prompt_of(24, seed=1)
    expected = greedy(stock("mixtral"), prompt, 12)
    source = HeldPackSource(packed("mixtral"))
    device = FakeDevice(speed=LATE)
    rig = make_rig(source, device, num_slots=8, stepped=False)
    real = device.fill_slots_cached
    countdown = iter(range(1000))

    def fill(*args: Any, **kwargs: Any) -> None:
        if next(countdown) in (0, 7, 20, 21, 22, 40):
            source.revoke()
        real(*args, **kwargs)

    device.check_sources = False
    device.fill_slots_cached = fill  # type: ignore[method-assign]
    assert greedy(rig.model, prompt, 12) == expected
    assert source.num_reattached > 3
    assert source.lease is None


def test_sessions_that_are_always_lost_are_an_error(packed: Make) -> None:
    source = HeldPackSource(packed("mixtral"))
    device = FakeDevice()
    rig = make_rig(source, device, num_slots=8, stepped=False, decode_graphs=DecodeGraphsMode.OFF)
    executor = device_executor(rig.model, rig.group, ROOM, 64, [].append)
    device.check_sources = False
    real = device.to_host

    def to_host(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        if source.lease is not None:
            source.revoke()
        return real(*tensors)

    device.to_host = to_host  # type: ignore[method-assign]
    with pytest.raises(SessionLostError) as raised:
        greedy_by(executor, PROMPT, 1)
    assert not isinstance(raised.value, StepLostError)
    assert source.num_reattached == MAX_FUTILE_RECOVERIES


def test_an_outage_in_the_midst_of_a_step(packed: Make, stock: Make) -> None:
    failures = iter([False] * 3 + [True, False, False, True, True] + [False] * 1000)

    def fail() -> None:
        if next(failures):
            raise UnavailableError("gone")

    absent = {(layer, expert) for layer in range(3) for expert in range(0, 8, 2)}
    source = HeldPackSource(packed("mixtral"), fail=fail, absent=absent, forgetful=True)
    rig = make_rig(source, num_slots=8, stepped=False)
    assert greedy(rig.model, PROMPT, 12) == greedy(stock("mixtral"), PROMPT, 12)
    assert source.num_reattached == 3


def test_a_dead_daemon_is_left_at_the_next_step(packed: Make) -> None:
    source = HeldPackSource(packed("mixtral"))
    rig = make_rig(source)
    first = rig.logits(PROMPT)
    source.connected = False
    assert torch.equal(rig.logits(PROMPT), first)
    assert source.num_reattached == 1


def test_the_arena_is_unregistered_before_it_is_unmapped(packed: Make) -> None:
    source = HeldPackSource(packed("mixtral"))
    rig = make_rig(source, num_slots=6)
    rig.logits(PROMPT)
    source.unmap()
    assert [memory.closed for memory in rig.device.memory] == [True]
    source.reattach(1)
    rig.logits(prompt_of(24, seed=2))
    assert [memory.closed for memory in rig.device.memory] == [True, False]
    rig.group.close()
    assert all(memory.closed for memory in rig.device.memory)
    with pytest.raises(PreconditionError, match="closed"):
        rig.logits(PROMPT)


def test_a_device_that_vanishes_gives_the_lease_back(packed: Make) -> None:
    source = HeldPackSource(packed("mixtral"))
    device = FakeDevice(speed=LATE)
    rig = make_rig(source, device, num_slots=6)
    real = device.fill_slots_cached

    def fill(*args: Any, **kwargs: Any) -> None:
        device.lose()
        real(*args, **kwargs)

    device.fill_slots_cached = fill  # type: ignore[method-assign]
    with pytest.raises(DeviceLostError, match=r"fake:0 does not answer.*start this worker again"):
        rig.logits(PROMPT)
    assert source.lease is None
    rig.group.close()


def test_what_torch_says_of_a_full_device_is_put_into_words(packed: Make) -> None:
    rig = make_rig(HeldPackSource(packed("mixtral")))
    error = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate")
    rig.device.explain = lambda raised: (  # type: ignore[method-assign]
        DeviceMemoryError("full; give less") if raised is error else None
    )

    def attention(*args: Any, **kwargs: Any) -> None:
        raise error

    rig.model.model.layers[1].self_attn.forward = attention
    with pytest.raises(DeviceMemoryError, match="give less"):
        rig.logits(PROMPT)
    assert rig.source.lease is None


def test_no_tokens_are_no_experts(packed: Make) -> None:
    rig = make_rig(HeldPackSource(packed("mixtral")), FakeDevice())
    hidden = torch.zeros(0, 128, dtype=torch.bfloat16)
    none = torch.zeros(0, 2, dtype=torch.int64), torch.ones(0, 2)
    out = rig.model.model.layers[0].mlp.experts(hidden, *none)
    assert (out.shape, out.dtype) == ((0, 128), torch.bfloat16)
    assert rig.group.stats.copies == 0
