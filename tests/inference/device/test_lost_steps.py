"""A session that is lost at a step's end: the step is repeated, and its tokens written once."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from expertd_inference.device.graphs import DecodeCache
from expertd_inference.settings import DecodeGraphsMode, OnMiss
from tests.inference.device.held_source import HeldPackSource
from tests.inference.device.rig import Rig, make_rig
from tests.inference.greedy import prompt_of

Make = Callable[..., Any]
PROMPT = prompt_of(9)
NUM_STEPS = 7


@pytest.fixture
def rig(packed: Make) -> Rig:
    # Fewer slots than a token needs over all layers: each step copies.
    return make_rig(
        HeldPackSource(packed("mixtral")),
        num_slots=4,
        speculate_layers=0,
        on_miss=OnMiss.COPY,
        decode_graphs=DecodeGraphsMode.SEGMENTS,
        dtype=torch.float32,
    )


@torch.no_grad()
def decode(rig: Rig, cache: Any, *, embeds: bool = False) -> tuple[list[int], torch.Tensor]:
    """Greedy tokens, and the logits of each step."""
    tokens, rows = [], []
    ids = torch.tensor([PROMPT])
    for step in range(NUM_STEPS):
        given: dict[str, Any] = {"input_ids": ids}
        if embeds and not step:
            given = {"inputs_embeds": rig.model.get_input_embeddings()(ids)}
        out = rig.model(**given, past_key_values=cache, use_cache=True)
        rows.append(out.logits[0, -1].clone())
        tokens.append(int(rows[-1].argmax()))
        ids = torch.tensor([[tokens[-1]]])
    return tokens, torch.stack(rows)


def lose_at_the_end_of(rig: Rig, calls: set[int]) -> list[int]:
    """The steps, by number, whose session was lost once they had computed all; filled later."""
    source, hold = rig.source, rig.group.step.hold
    finish, lost, ends = rig.group.step._finish, [], iter(range(1000))

    def losing() -> None:
        if (number := next(ends)) in calls:
            assert hold._copies, "a step that copied nothing loses nothing"
            source.revoke()
            lost.append(number)
        finish()

    rig.group.step._finish = losing  # type: ignore[method-assign]
    return lost


def cache_of(rig: Rig, kind: str) -> Any:
    return DynamicCache() if kind == "dynamic" else DecodeCache(rig.model.config, 32)


@pytest.mark.parametrize("kind", ["recorded", "dynamic"])
# The prompt; its repetition; the steps that warm up, record and replay.
@pytest.mark.parametrize("calls", [{0}, {0, 1}, {1}, {2}, {3}, {4, 5, 7}])
def test_tokens_are_written_once(kind: str, calls: set[int], rig: Rig) -> None:
    expected = decode(rig, cache_of(rig, kind))
    lost, cache = lose_at_the_end_of(rig, calls), cache_of(rig, kind)
    tokens, logits = decode(rig, cache)
    assert lost == sorted(calls)
    assert tokens == expected[0]
    assert torch.equal(logits, expected[1])
    assert int(cache.get_seq_length()) == len(PROMPT) + NUM_STEPS - 1


def test_a_prompt_of_embeddings_is_counted(rig: Rig) -> None:
    expected = decode(rig, cache_of(rig, "recorded"))
    cache = cache_of(rig, "recorded")
    tokens, _ = decode(rig, cache, embeds=True)
    assert tokens == expected[0]
    assert cache.num_tokens == len(PROMPT) + NUM_STEPS - 1
    assert rig.group.graphs is not None
    assert rig.group.graphs.num_replays == 2 * (NUM_STEPS - 3)
