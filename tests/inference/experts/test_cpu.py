"""The seam: our experts function in place of transformers' own, on every architecture."""

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from expertd_inference.experts import cpu as experts_module
from expertd_inference.experts.call import seat_of
from expertd_inference.experts.cpu import connect
from expertd_inference.experts.recovery import MAX_FUTILE_RECOVERIES, Recovery
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.model.loading import load_trunk
from expertd_testing.tiny_models import CONFIGS
from expertstore.errors import ExpertdError, IncarnationError, SessionLostError, UnavailableError
from tests.inference.greedy import greedy, prompt_of
from tests.inference.pack_source import PackSource

Make = Callable[..., Any]


def load(source: PackSource, dtype: torch.dtype = torch.bfloat16, **recovery: Any) -> Any:
    trunk = load_trunk(source.pack, source.manifest, dtype=dtype)
    options = {"reattach_seconds": 1.0, "say": lambda _: None} | recovery
    connect(trunk.experts, source.manifest, source, Recovery(source, **options))
    return trunk.model


@torch.no_grad()
def logits(model: Any, prompt: list[int]) -> torch.Tensor:
    result: torch.Tensor = model(torch.tensor([prompt])).logits
    return result


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_bits_of_stock(architecture: str, dtype: torch.dtype, stock: Make, packed: Make) -> None:
    # One expert per wave, and a prompt that reaches most experts.
    ours = load(PackSource(packed(architecture), wave=1), dtype)
    theirs = stock(architecture, dtype)
    prompt = prompt_of(40, seed=1)
    assert theirs.config._experts_implementation == "grouped_mm", "what stock does by default"
    # Equal, not close: the same operations on the same shapes.
    assert torch.equal(logits(ours, prompt), logits(theirs, prompt))
    tokens = greedy(ours, prompt, 32)
    assert tokens == greedy(theirs, prompt, 32)
    assert len(set(tokens)) > 8, "a model that repeats itself proves little"


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_tokens_of_stock_eager(architecture: str, stock: Make, packed: Make) -> None:
    # Eager rounds after each expert, so in bf16 it may differ from stock's own default; in
    # fp32 a token would have to be a tie to 1e-6.
    ours = load(PackSource(packed(architecture)), torch.float32)
    theirs = stock(architecture, torch.float32)
    theirs.set_experts_implementation("eager")
    try:
        prompt = prompt_of(24, seed=1)
        assert torch.allclose(logits(ours, prompt), logits(theirs, prompt), atol=1e-4)
        assert greedy(ours, prompt, 24) == greedy(theirs, prompt, 24)
    finally:
        theirs.set_experts_implementation("grouped_mm")


def test_waves_do_not_matter(packed: Make) -> None:
    prompt = prompt_of(40)
    results = [logits(load(PackSource(packed("mixtral"), wave=w)), prompt) for w in (1, 2, 3, 8)]
    assert all(torch.equal(results[0], result) for result in results)


def test_a_batch_equals_its_rows(packed: Make) -> None:
    model = load(PackSource(packed("qwen3_moe")), torch.float32)
    rows = [prompt_of(20, seed=seed) for seed in range(3)]
    with torch.no_grad():
        together = model(torch.tensor(rows)).logits
    for row, expected in zip(rows, together, strict=True):
        # Not equal: a matrix product of other shape adds in another order.
        assert torch.allclose(logits(model, row)[0], expected, atol=1e-4)


def test_blocks_of_a_long_prompt(packed: Make, monkeypatch: pytest.MonkeyPatch) -> None:
    source = PackSource(packed("mixtral"))
    model = load(source, torch.float32)
    prompt = prompt_of(50)
    whole = logits(model, prompt)
    # 2 slots of 128 float32 per token: blocks of 16 tokens, the last of 2.
    monkeypatch.setattr(experts_module, "MAX_SLOT_BYTES", 16 * 2 * 128 * 4)
    source.waves_taken.clear()
    assert torch.allclose(logits(model, prompt), whole, atol=1e-4)
    assert [layer for layer, _ in source.waves_taken] == [0, 1, 2], "one lease for all blocks"


def test_experts_that_do_not_fit_at_once_are_brought_once_per_prompt(
    packed: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = PackSource(packed("mixtral"), wave=6)
    model, prompt = load(source, torch.float32), prompt_of(50)
    whole = logits(model, prompt)
    monkeypatch.setattr(experts_module, "MAX_SLOT_BYTES", 16 * 2 * 128 * 4)
    source.waves_taken.clear()
    assert torch.equal(logits(model, prompt), whole)
    waves = [(layer, len(experts)) for layer, experts in source.waves_taken]
    assert waves == [(layer, size) for layer in range(3) for size in (6, 2)]
    # Not where no memory is free for that.
    monkeypatch.setattr(experts_module, "memory_available", lambda: 0)
    source.waves_taken.clear()
    logits(model, prompt)
    assert len(source.waves_taken) > 6


def test_only_what_is_routed_to_is_leased(packed: Make) -> None:
    source = PackSource(packed("mixtral"))
    logits(load(source), [7])
    assert [layer for layer, _ in source.waves_taken] == [0, 1, 2]
    assert all(len(experts) == 2 for _, experts in source.waves_taken)


@torch.no_grad()
def test_what_is_past_the_last_expert_is_none(packed: Make) -> None:
    model = load(PackSource(packed("mixtral")))
    experts = model.model.layers[1].mlp.experts
    hidden = torch.randn(2, 128, dtype=torch.bfloat16)
    weights = torch.rand(2, 3, dtype=torch.bfloat16)
    result = experts(hidden, torch.tensor([[8, 2, 8], [8, 8, 8]]), weights)
    alone = experts(hidden[:1], torch.tensor([[2]]), weights[:1, 1:2])
    assert torch.equal(result, torch.cat((alone, torch.zeros_like(alone))))


@torch.no_grad()
def test_a_call_made_before_may_name_none_later(packed: Make) -> None:
    """What was prepared keeps the results of its last run, which "none" must not be given."""
    source = PackSource(packed("mixtral", "4bit"))
    trunk = load_trunk(source.pack, source.manifest)
    recovery = Recovery(source, reattach_seconds=0)
    connect(trunk.experts, source.manifest, source, recovery, NativeKernels())
    seat = seat_of(trunk.experts[1])
    rows = torch.randn(2, 128, dtype=torch.bfloat16)
    index, weights = torch.tensor([[0, 1], [2, 3]]), torch.rand(2, 2, dtype=torch.bfloat16)
    call = seat.prepare(rows, index, weights)
    assert call.prepared is not None
    for values in ([[0, 1], [2, 3]], [[8, 2], [8, 8]], [[5, 1], [1, 7]]):
        index.copy_(torch.tensor(values))
        found = seat.runner.run(call).clone()
        assert torch.equal(found, seat.runner.run(seat.call(rows, index, weights)))


def test_layers_without_experts_are_skipped(packed: Make) -> None:
    # deepseek_v3's layer 0 and qwen2_moe's layer 1 are dense.
    for architecture, layers in (("deepseek_v3", [1, 2]), ("qwen2_moe", [0, 2])):
        source = PackSource(packed(architecture))
        logits(load(source), [7])
        assert [layer for layer, _ in source.waves_taken] == layers


@pytest.mark.parametrize("revoked", [{0}, {1}, {4}, {0, 1, 2}, {3, 5}])
def test_what_a_lost_lease_gave_is_thrown_away(
    revoked: set[int], packed: Make, stock: Make
) -> None:
    source = PackSource(packed("mixtral"), wave=3, revoked=frozenset(revoked))
    prompt = prompt_of(40)
    result = logits(load(source), prompt)
    assert source.num_reattached == len(revoked)
    assert torch.equal(result, logits(stock("mixtral"), prompt))


def test_a_lost_session_halves_the_wave(packed: Make) -> None:
    source = PackSource(packed("mixtral"), revoked=frozenset({0, 1}))
    logits(load(source), prompt_of(40))
    assert [len(experts) for _, experts in source.waves_taken[:6]] == [8, 4, 2, 2, 2, 2]


def test_sessions_that_are_always_lost_are_an_error(packed: Make) -> None:
    source = PackSource(packed("mixtral"), revoked=frozenset(range(1000)))
    with pytest.raises(SessionLostError):
        logits(load(source), prompt_of(40))
    assert source.num_reattached == MAX_FUTILE_RECOVERIES
    assert len(source.waves_taken[-1][1]) == 1


@pytest.mark.parametrize("kind", [UnavailableError, IncarnationError])
def test_goes_on_after_an_outage(kind: type[ExpertdError], packed: Make, stock: Make) -> None:
    failures = iter([False, False, True, False, True])

    def fail() -> None:
        if next(failures, False):
            raise kind("gone")

    said: list[str] = []
    source = PackSource(packed("mixtral"), wave=3, fail=fail)
    prompt = prompt_of(40)
    result = logits(load(source, say=said.append), prompt)
    assert torch.equal(result, logits(stock("mixtral"), prompt))
    assert said == ["daemon gone, waiting to re-attach", "re-attached"] * 2


def test_a_dead_daemon_is_left_at_the_next_step(packed: Make) -> None:
    source = PackSource(packed("mixtral"))
    model = load(source)
    logits(model, [7])
    source.connected = False
    logits(model, [7])
    assert source.num_reattached == 1


def test_without_time_to_reattach_the_error_stands(packed: Make) -> None:
    def fail() -> None:
        raise UnavailableError("gone")

    source = PackSource(packed("mixtral"), fail=fail)
    with pytest.raises(UnavailableError, match="gone"):
        logits(load(source, reattach_seconds=0), [7])
    assert source.num_reattached == 0


def test_threads_take_turns(packed: Make) -> None:
    # PackSource asserts that no lease is taken while another is held.
    source = PackSource(packed("mixtral"), wave=2)
    model = load(source)
    prompts = [prompt_of(30, seed=seed) for seed in range(4)]
    expected = [logits(model, prompt) for prompt in prompts]
    results: dict[int, torch.Tensor] = {}

    def run(index: int) -> None:
        results[index] = logits(model, prompts[index])

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(torch.equal(results[index], expected[index]) for index in range(4))


def test_a_failing_layer_releases_its_lease(packed: Make) -> None:
    source = PackSource(packed("mixtral"))
    model = load(source)
    with pytest.raises(RuntimeError):
        model.model.layers[0].mlp.experts(
            torch.zeros(1, 7), torch.tensor([[0, 1]]), torch.ones(1, 2)
        )
    assert not source.held
    logits(model, [7])


def test_gradients_are_not_kept(packed: Make) -> None:
    model = load(PackSource(packed("mixtral")))
    assert not any(parameter.requires_grad for parameter in model.parameters())
    # A graph would keep tensors of the arena beyond their lease.
    hidden = torch.zeros(1, 128, dtype=torch.bfloat16, requires_grad=True)
    experts = model.model.layers[0].mlp.experts
    assert not experts(hidden, torch.tensor([[0, 1]]), torch.ones(1, 2)).requires_grad


def test_a_model_without_its_experts_is_not_saved(packed: Make, tmp_path: Path) -> None:
    model = load(PackSource(packed("mixtral")))
    with pytest.raises(ValueError, match="serializ"):
        model.save_pretrained(tmp_path)


def test_no_tokens_are_no_experts(packed: Make) -> None:
    source = PackSource(packed("mixtral"))
    experts = load(source).model.layers[0].mlp.experts
    none = torch.zeros(0, 2, dtype=torch.int64), torch.ones(0, 2)
    out = experts(torch.zeros(0, 128, dtype=torch.bfloat16), *none)
    assert (out.shape, out.dtype) == ((0, 128), torch.bfloat16)
    assert not source.waves_taken
