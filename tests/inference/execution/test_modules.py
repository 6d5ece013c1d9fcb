"""Rows of several sequences, computed together, are each sequence computed alone."""

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.qwen3_next import modeling_qwen3_next

from expertd_inference.execution import delta_hook
from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.layers import watch_layers
from expertd_inference.execution.modules import ModulesExecutor
from expertd_inference.kernels.cpu.delta import Places, delta_step
from expertd_inference.kernels.cpu.library import native_library
from expertd_testing.tiny_models import CONFIGS, make_model
from tests.architectures.batches import WINDOW, Texts, alone, batched_model, chosen, compare
from tests.architectures.tiny_configs import language_model_type
from tests.inference.greedy import prompt_of

DELTA = ["kimi_linear", "qwen3_5_moe", "qwen3_next"]
"""Whose states a native kernel changes where they lie."""
RECURRENT = [
    "granitemoehybrid",
    "jamba",
    "lfm2_moe",
    "minimax",
    "zaya",
    *DELTA,
]
TURNS = {
    "deepseek_v32": "DynamicIndexedLayer keeps more than keys and values",
    "inkling": "its attention asks for position bias",
}


def model_of(architecture: str, **settings: Any) -> Any:
    """In float32, where nothing is rounded away."""
    if architecture in CONFIGS:
        return make_model(architecture, dtype=torch.float32, **settings)
    return batched_model(language_model_type(architecture) or architecture, **settings)


@pytest.mark.parametrize("architecture", list(CONFIGS))
def test_sequences_together(architecture: str) -> None:
    executor, same = compare(model_of(architecture))
    assert same
    assert executor.name == "modules"
    assert executor.shares_prefixes
    assert not executor.recurrent


@pytest.mark.parametrize(
    "architecture", ["mixtral", "gpt_oss", "mimo_v2_flash", "gemma4", "phimoe"]
)
def test_windows(architecture: str) -> None:
    """As sdpa has them, with sinks, with heads that differ by layer, and by the mask alone."""
    executor, same = compare(model_of(architecture, sliding_window=WINDOW))
    assert same
    assert executor.name == "modules"


def test_layers_that_share_keys() -> None:
    kinds = ["sliding_attention", "full_attention"] * 2
    model = model_of("gemma4", num_kv_shared_layers=2, layer_types=kinds)
    executor, same = compare(model)
    assert same
    assert isinstance(executor, ModulesExecutor)
    assert len(executor.memory.keys) == 2, "of four layers"


@pytest.mark.parametrize("architecture", RECURRENT)
def test_recurrent_states(architecture: str) -> None:
    executor, same = compare(model_of(architecture))
    assert same
    assert executor.name == "modules"
    assert executor.recurrent
    assert not executor.shares_prefixes


@pytest.mark.skipif(native_library().library is None, reason="no native library")
@pytest.mark.parametrize("architecture", DELTA)
def test_states_that_are_changed_in_place(
    architecture: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a native kernel in a step, and by transformers' function for whoever else calls."""
    model = model_of(architecture)
    prompt = torch.tensor([prompt_of(9)])
    expected = model.generate(prompt, max_new_tokens=4, do_sample=False)
    executor = chosen(model)
    assert isinstance(executor, ModulesExecutor)
    kinds = [name.kind for name in executor.layers.in_place]
    assert len(kinds) > 1
    assert set(kinds) == {"recurrent"}
    assert watch_layers(model).in_place == executor.layers.in_place, "hooked once for all"
    calls: list[int] = []

    def step(states: Tensor, places: Places, *rows: Tensor) -> Tensor:
        calls.append(places.num_sequences)
        return delta_step(states, places, *rows)

    monkeypatch.setattr(delta_hook, "delta_step", step)
    assert torch.equal(model.generate(prompt, max_new_tokens=4, do_sample=False), expected)
    assert not calls
    texts = Texts(executor, [prompt_of(12, seed=seed) for seed in (1, 2)])
    texts.step({0: 6, 1: 5})
    texts.step({0: 1, 1: 1})
    assert calls == [2] * len(kinds)


def test_a_function_of_that_name_that_does_something_else_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    theirs = modeling_qwen3_next.torch_recurrent_gated_delta_rule

    def odd(*parts: Any, **others: Any) -> Any:
        out, state = theirs(*parts, **others)
        return out * 1.1, state

    monkeypatch.setattr(modeling_qwen3_next, "torch_recurrent_gated_delta_rule", odd)
    model = model_of("qwen3_next")
    assert not watch_layers(model).in_place
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("architecture", list(TURNS))
def test_in_turns(architecture: str) -> None:
    executor, same = compare(model_of(architecture))
    assert same
    assert executor.name == "turns"
    assert TURNS[architecture] in executor.reason
    assert not executor.shares_prefixes


def test_only_wanted_rows_have_logits() -> None:
    for architecture, name in (("mixtral", "modules"), ("zaya", "modules"), ("inkling", "turns")):
        executor = chosen(model_of(architecture))
        assert executor.name == name
        texts = Texts(executor, [prompt_of(9), prompt_of(5, seed=1), prompt_of(7, seed=2)])
        kinds = [Wanted.LAST, Wanted.NONE, Wanted.ALL]
        everything = executor.forward(Batch(tuple(texts.spans({0: 8, 1: 4, 2: 6}))))
        spans = [texts.spans({n: rows}, kinds[n])[0] for n, rows in ((0, 8), (1, 4), (2, 6))]
        batch = Batch(tuple(spans))
        found = executor.forward(batch)
        assert len(found) == batch.num_wanted == 1 + 0 + 6
        torch.testing.assert_close(found, everything[[7, *range(12, 18)]], rtol=1e-4, atol=1e-5)
        nothing = executor.forward(Batch(tuple(texts.spans({1: 4}, Wanted.NONE))))
        assert nothing.shape == (0, everything.shape[1])
        # Sequences that go on by one row each, of which one wants nothing.
        on = [
            Span(100 + n, [t[-1]], len(t) - 1, spans[n].blocks, n, kinds[n])
            for n, t in enumerate(texts.texts)
        ]
        assert len(executor.forward(Batch(tuple(on)))) == 2


def test_a_sequence_goes_on_from_blocks_that_another_filled() -> None:
    model = model_of("olmoe")
    prompt = prompt_of(70)
    other = [*prompt[:64], *prompt_of(6, seed=9)]
    expected = alone(model, other)[64:]
    executor = chosen(model)
    executor.forward(Batch((Span(1, prompt, 0, [7, 3], None, Wanted.LAST),)))
    ours = executor.forward(Batch((Span(2, other[64:], 64, [7, 5], None, Wanted.ALL),)))
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


class LostError(Exception):
    pass


@pytest.mark.parametrize("architecture", ["mixtral", "lfm2_moe", "qwen3_next", "inkling"])
def test_a_lost_step_is_repeated(architecture: str) -> None:
    """Whatever a step had done until it was lost, it gives the same when it is repeated."""
    model = model_of(architecture)
    prompts = [prompt_of(12, seed=seed) for seed in (1, 2)]
    expected = [alone(model, prompt) for prompt in prompts]
    executor = chosen(model)
    texts = Texts(executor, prompts)
    texts.step({0: 6})
    last = [module for name, module in model.named_modules() if name.endswith("experts")][-1]

    def lose_at(number: int, rows: dict[int, int]) -> None:
        passes = itertools.count(1)

        def lose(*_: object) -> None:
            if next(passes) == number:
                raise LostError

        handle = last.register_forward_hook(lose)
        with pytest.raises(LostError):
            texts.step(rows, counted=False)
        handle.remove()

    for rows in ({1: 5, 0: 1}, {0: 1, 1: 1}, {1: 2, 0: 1}):
        lose_at(1, rows)
        # Where the step is of two passes, also in the second.
        if architecture == "inkling" or (architecture in RECURRENT and rows[1] > 1):
            lose_at(2, rows)
        texts.step(rows)
    for ours, theirs in zip(texts.logits, expected, strict=True):
        assert (ours - theirs[: len(ours)]).norm() / theirs.norm() < 2e-5


def test_a_span_at_position_0_begins_anew() -> None:
    for architecture in ("mixtral", "lfm2_moe", "qwen3_next", "inkling"):
        model = model_of(architecture)
        prompt = prompt_of(9)
        expected = alone(model, prompt)
        executor = chosen(model)
        assert executor.name == ("turns" if architecture == "inkling" else "modules")
        texts = Texts(executor, [prompt])
        texts.step({0: 5})
        again = Texts(executor, [prompt])
        again.step({0: 7})
        again.step({0: 2})
        torch.testing.assert_close(again.logits[0], expected, rtol=1e-3, atol=1e-4)


def test_in_turns_a_slot_keeps_the_text_of_the_last_that_had_it() -> None:
    executor = chosen(model_of("inkling"))

    def step(sequence: int, slot: int, tokens: list[int], position: int) -> None:
        executor.forward(Batch((Span(sequence, tokens, position, [0], slot, Wanted.LAST),)))

    step(0, 0, [1, 2, 3], 0)
    step(1, 1, [1, 2], 0)
    for sequence in range(2, 9):  # however many come and go beside it
        step(sequence, 1, [1, 2], 0)
    step(0, 0, [4], 3)
    with pytest.raises(ValueError, match="sequence 1 goes on from rows that were not computed"):
        step(1, 1, [5], 3)


def test_a_model_on_several_devices() -> None:
    model = model_of("mixtral")
    model.model.norm.to("meta")
    assert chosen(model).reason == "its layers lie on several devices"


def test_an_executor_that_computes_something_else_is_not_chosen() -> None:
    """Here the attention of one layer is scaled by something that only a text alone has."""
    model = model_of("mixtral")
    attention = model.model.layers[1].self_attn
    forward = attention.forward

    def odd(*args: Any, **kwargs: Any) -> Any:
        output, weights = forward(*args, **kwargs)
        positions = kwargs["position_ids"].view(-1)
        one_text = bool((positions.diff() == 1).all())
        return output * (3 if one_text else 1), weights

    attention.forward = odd
    executor = chosen(model)
    assert executor.name == "turns"
    assert "rows packed together gave something else" in executor.reason
