"""Whatever comes, is cancelled or preempted when: the same texts, blocks counted, nobody starves."""

import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd_inference import GenerationSettings
from expertd_inference.engine.limits import Limits, rows_within
from expertd_inference.engine.scheduler import Scheduler
from expertd_inference.engine.sequence import Phase, Sequence
from expertd_inference.execution.batch import Wanted
from expertd_inference.kv.pool import BLOCK_TOKENS, BlockPool
from expertstore.errors import BusyError, InvalidInputError, PromptTooLongError
from tests.inference.engine.world import NUM_TOKENS, World, text_alone

KINDS: dict[str, tuple[dict[str, object], bool]] = {
    "packed": ({}, False),
    "few rows": ({"max_rows": 7}, False),
    "one row": ({"max_rows": 1}, False),
    "in turns": ({"max_spans": 1, "whole_prompts": True}, False),
    "hybrid": ({"max_prompts": 1, "mixed": False, "replays_rows": True, "max_rows": 65}, True),
    "hybrid, more rows": (
        {"max_prompts": 1, "mixed": False, "replays_rows": True, "max_rows": 200},
        True,
    ),
}


def make(
    id: int,  # noqa: A002
    prompt: list[int],
    max_new: int = 20,
    *,
    user: str = "",
    priority: int = 0,
    **more: object,
) -> Sequence:
    wanted = GenerationSettings(max_new_tokens=max_new, **more)  # type: ignore[arg-type]
    return Sequence(id, prompt, wanted, user=user, priority=priority)


def prompts() -> st.SearchStrategy[list[int]]:
    """Few beginnings, so that many are shared; lengths around the edges of blocks."""
    lengths = st.sampled_from([1, 2, 63, 64, 65, 66, 127, 128, 129, 130, 193, 200])
    return st.builds(
        lambda seed, shared, end: [
            *random.Random(seed).choices(range(NUM_TOKENS), k=shared),
            *random.Random(end).choices(range(NUM_TOKENS), k=1 + end),
        ],
        st.integers(0, 1),
        lengths,
        st.integers(0, 3),
    )


Act = Callable[[World, random.Random], None]


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_texts_are_those_of_each_sequence_alone(kind: str, data: st.DataObject) -> None:
    options, recurrent = KINDS[kind]
    running = data.draw(st.integers(1, 6))
    limits = Limits(**{"max_running": running, "max_rows": 100, **options})  # type: ignore[arg-type]
    num_slots = data.draw(st.integers(1, running)) if recurrent else None
    world = World(limits, data.draw(st.integers(5, 14)), num_slots)
    for _ in range(data.draw(st.integers(1, 25))):
        ids = list(world.sequences)
        act = data.draw(st.sampled_from(["add", "add", "step", "steps", "cancel", "within", "plan"]))
        if act == "add":
            asks = data.draw(st.sampled_from([None, None, None, 0]))
            one = make(
                len(ids),
                data.draw(prompts()),
                data.draw(st.integers(1, 90)),
                user=data.draw(st.sampled_from("ab")),
                priority=data.draw(st.integers(0, 1)),
                prompt_logprobs=asks,
            )
            world.add(one)
        elif act == "cancel" and ids:
            world.cancel(data.draw(st.sampled_from(ids)))
        elif act == "plan":
            plan = world.plan()
            if not recurrent:  # an executor writes states at the end of a step, which is not lost
                world.compute(plan)
        elif act == "within" and ids:
            world.step(data.draw(st.sampled_from([None, 1.0, 50.0])), data.draw(st.sampled_from(ids)))
        else:
            for _ in range(30 if act == "steps" else 1):
                world.step(data.draw(st.sampled_from([None, 50.0])) if act == "step" else None)
    rows = sum(one.num_prompt + one.max_new_tokens for one in world.sequences.values())
    # Each row once, and again after each preemption, of which each step has a few.
    world.drain(max_steps=60 * rows + 100)
    world.check_texts()
    world.scheduler.abandon()  # of a plan that was never done
    assert world.pool.num_free == world.pool.num_blocks
    assert world.scheduler.num_waiting == world.scheduler.num_running == 0


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 1 << 32),
    num_users=st.integers(1, 40),
    is_cancelled=st.booleans(),
    priority=st.integers(0, 1),
    same_prompt=st.booleans(),
)
def test_none_starves_whatever_comes_after_it(
    seed: int, num_users: int, *, is_cancelled: bool, priority: int, same_prompt: bool
) -> None:
    """A queue kept full by newer, higher or cancelled ones; the bound depends on its length only."""
    chance = random.Random(seed)
    limits = Limits(max_running=3, max_rows=64, max_waiting=8)
    world = World(limits, 8)
    prompt = chance.choices(range(NUM_TOKENS), k=150)
    old = make(0, prompt, 60, user="old")
    world.add(old)
    next_id = 1
    for num_steps in range(20_000):
        if old.phase is Phase.FINISHED:
            break
        while world.scheduler.num_waiting < limits.max_waiting:
            length = chance.choice([1, 64, 150, 300])
            new = prompt if same_prompt else chance.choices(range(NUM_TOKENS), k=length)
            world.add(
                make(
                    next_id,
                    new,
                    chance.choice([1, 40]),
                    user=f"{next_id % num_users}",
                    priority=priority,
                )
            )
            next_id += 1
        within = None
        if is_cancelled:
            live = [
                one.id
                for one in world.sequences.values()
                if one.phase is not Phase.FINISHED and one is not old
            ]
            within = chance.choice(live)
        world.step(cancel_within=within)
        for id in [x for x, one in world.sequences.items() if one.phase is Phase.FINISHED and x]:  # noqa: A001
            del world.sequences[id]
    assert old.phase is Phase.FINISHED, f"{old} after {num_steps} steps, {next_id} others"
    assert old.tokens[150:] == text_alone(prompt, 60)
