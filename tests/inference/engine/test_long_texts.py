"""Texts past the point where all their positions get other angles, as Phi-3.5-MoE has it."""

from typing import Any

import pytest
import torch
from torch import Tensor

from expertd_inference import Engine, EngineLimits, GenerationSettings
from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.choose import choose_for
from expertd_inference.execution.executor import Executor
from expertd_inference.execution.room import Room
from expertd_inference.execution.turns import TurnsExecutor
from expertd_testing.tiny_models import make_model
from tests.architectures.batches import Texts, alone, batched_model, chosen
from tests.inference.engine.toy import ToyWorker
from tests.inference.greedy import prompt_of

POINT = 96
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 10_000.0,
    "short_factor": [1.0] * 16,
    "long_factor": [4.0] * 16,
    "short_mscale": 1.0,
    "long_mscale": 1.2,
    "original_max_position_embeddings": POINT,
}


@pytest.fixture(scope="module")
def model() -> Any:
    return make_model("phimoe", dtype=torch.float32, rope_parameters=LONGROPE)


def close(ours: Tensor, theirs: Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_long_and_short_texts_in_one_step(model: Any) -> None:
    executor = chosen(model)
    assert executor.name == "modules"
    assert executor.turning_point == POINT
    texts = Texts(executor, [prompt_of(POINT + 3), prompt_of(40, seed=1), prompt_of(POINT, seed=2)])
    texts.step({0: POINT + 1, 1: 20})
    texts.step({2: POINT - 1, 0: 1, 1: 19})
    texts.step({1: 1, 0: 1, 2: 1})
    for ours, text in zip(texts.logits, texts.texts, strict=True):
        close(ours, alone(model, text))
    only_long = Batch((Span(100, [5], POINT + 3, [11, 8], 0, Wanted.NONE),))
    assert executor.forward(only_long).shape[0] == 0
    assert (alone(model, texts.texts[0])[:9] - alone(model, texts.texts[0][:9])).abs().max() > 0.1


def test_in_turns(model: Any) -> None:
    """Where they are computed so, the executor computes a text anew by itself."""
    prompts = [prompt_of(POINT + 4, seed=seed) for seed in (1, 2)]
    texts = Texts(TurnsExecutor(model, "a test asked for it"), prompts)
    texts.step({0: POINT - 2, 1: POINT - 1})
    for _ in range(5):
        texts.step({0: 1, 1: 1})
    for ours, prompt in zip(texts.logits, prompts, strict=True):
        for length in (POINT, POINT + 1, POINT + 3):
            close(ours[length - 1], alone(model, prompt[:length])[-1])


def test_an_engine_s_texts_are_those_of_each_alone(model: Any) -> None:
    class Worker(ToyWorker):
        context_tokens = 512

        def open_executor(self, room: Room) -> Executor:  # type: ignore[override]
            return choose_for(model, room, lambda _: None)

    begin = prompt_of(70)
    prompts = [begin, [*begin, *prompt_of(20)], prompt_of(90, seed=1), prompt_of(150, seed=2)]
    settings = GenerationSettings(max_new_tokens=40, ignore_eos=True)
    with Engine(Worker(), EngineLimits(max_sequences=4, kv_tokens=10 * 64)) as engine:
        assert engine.executor == "modules"
        streams = [engine.submit(prompt, settings) for prompt in prompts for _ in range(2)]
        found = [[token.id for token in stream] for stream in streams]
        stats = engine.stats
    assert stats.prefix_hits > 0
    assert stats.rows_mean > 2
    for number, prompt in enumerate(prompts):
        text = list(prompt)
        for _ in range(settings.max_new_tokens):
            text.append(int(alone(model, text)[-1].argmax()))
        assert found[2 * number] == found[2 * number + 1] == text[len(prompt) :]


def test_other_ways_of_changing_angles() -> None:
    dynamic = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
    executor = chosen(batched_model("mixtral", rope_parameters=dynamic))
    assert executor.name == "turns"
    assert "how long a text is" in executor.reason
    # A model whose context ends there has no other angles.
    short = LONGROPE | {"original_max_position_embeddings": 512}
    assert chosen(make_model("phimoe", rope_parameters=short)).turning_point is None
