"""Whatever comes, is cancelled or preempted: the same texts, blocks counted, none starves."""

import random
from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, cast

import hypothesis
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd_inference import GenerationSettings
from expertd_inference.engine.budget import EngineLimits, scheduler_limits
from expertd_inference.engine.limits import SchedulerLimits
from expertd_inference.engine.sequence import Origin, Sequence, SequencePhase
from expertd_inference.execution.batch import Wanted
from expertd_inference.execution.room import Room
from expertd_inference.kv.pool import BLOCK_TOKENS, BlockPool
from expertstore.errors import BusyError, InvalidInputError, PromptTooLongError
from tests.inference.engine.world import NUM_TOKENS, World, recurrent_alone, text_alone


@dataclass(frozen=True)
class Kind:
    """What an executor says of itself."""

    max_rows: int = 100
    shares_prefixes: bool = True
    recurrent: bool = False
    turning_point: int | None = None

    def limits(self, max_running: int, **more: int) -> SchedulerLimits:
        """Those that the product plans with."""
        room = Room(num_blocks=1, num_sequences=max_running, num_rows=self.max_rows)
        worker = SimpleNamespace(context_tokens=None, vocabulary=NUM_TOKENS, experts_per_token=[2])
        return scheduler_limits(EngineLimits(**more), room, cast("Any", self), cast("Any", worker))


KINDS = {
    "packed": Kind(),
    "few rows": Kind(max_rows=7),
    "one row": Kind(max_rows=1),
    "long texts are others": Kind(turning_point=100),
    "long texts are others, few rows": Kind(turning_point=127, max_rows=20),
    "in turns": Kind(shares_prefixes=False),
    "hybrid": Kind(max_rows=65, shares_prefixes=False, recurrent=True),
    "hybrid, more rows": Kind(max_rows=200, shares_prefixes=False, recurrent=True),
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
    return Sequence(id, prompt, wanted, Origin(user=user, priority=priority))


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


MAX_WAIT_STEPS = 8_000  # twice what was seen


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_texts_are_those_of_each_sequence_alone(kind: str, data: st.DataObject) -> None:
    world = World(KINDS[kind].limits(data.draw(st.integers(1, 6))), data.draw(st.integers(5, 14)))
    for _ in range(data.draw(st.integers(1, 25))):
        ids = list(world.sequences)
        act = data.draw(
            st.sampled_from(["add", "add", "step", "steps", "cancel", "within", "plan"])
        )
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
            if world.states is None:  # those are written at the end of a step, which is not lost
                world.compute(plan)
        elif act == "within" and ids:
            world.step(
                data.draw(st.sampled_from([None, 1.0, 50.0])), data.draw(st.sampled_from(ids))
            )
        else:
            for _ in range(30 if act == "steps" else 1):
                world.step(data.draw(st.sampled_from([None, 50.0])) if act == "step" else None)
    rows = sum(one.num_prompt + one.max_new_tokens for one in world.sequences.values())
    # Each row once, and again after each preemption, of which each step has a few.
    world.drain(max_steps=60 * rows + 100)
    world.check_texts()
    assert world.pool.num_free == world.pool.num_blocks
    assert world.scheduler.num_waiting == world.scheduler.num_running == 0
    # Nothing is kept of users and sequences that have gone.
    assert not world.scheduler._waiting._rows
    assert not world.scheduler._served
    assert not any(vars(world.scheduler._work).values())


@pytest.mark.parametrize("kind", ["packed", "in turns", "hybrid"])
@settings(max_examples=30, deadline=None, phases=[hypothesis.Phase.generate])
@given(
    seed=st.integers(0, 1 << 32),
    num_users=st.integers(1, 40),
    is_cancelled=st.booleans(),
    priority=st.integers(0, 1),
    same_prompt=st.booleans(),
    most_new=st.sampled_from([1, 40]),
)
def test_none_starves_whatever_comes_after_it(
    kind: str,
    seed: int,
    num_users: int,
    *,
    is_cancelled: bool,
    priority: int,
    same_prompt: bool,
    most_new: int,
) -> None:
    """A queue kept full by newer, higher or cancelled ones; its length alone bounds the wait."""
    chance = random.Random(seed)
    limits = KINDS[kind].limits(3, max_waiting=8)
    world = World(limits, 8)
    prompt = chance.choices(range(NUM_TOKENS), k=150)
    old = make(0, prompt, 60, user="old")
    world.add(old)
    next_id = 1
    for _ in range(MAX_WAIT_STEPS):
        if old.phase is SequencePhase.FINISHED:
            break
        while world.scheduler.num_waiting < limits.max_waiting:
            length = chance.choice([1, 64, 150, 300])
            new = prompt if same_prompt else chance.choices(range(NUM_TOKENS), k=length)
            world.add(
                make(
                    next_id,
                    new,
                    chance.choice([1, most_new]),
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
                if one.phase is not SequencePhase.FINISHED and one is not old
            ]
            within = chance.choice(live)
        world.step(cancel_within=within)
        over = [x for x, one in world.sequences.items() if one.phase is SequencePhase.FINISHED]
        for number in filter(None, over):
            del world.sequences[number]
    assert old.phase is SequencePhase.FINISHED, f"{old}, after {next_id} others"
    assert old.tokens[150:] == world.text_alone(prompt, 60)


def limits(**more: object) -> SchedulerLimits:
    return SchedulerLimits(**{"max_running": 8, "max_rows": 512, **more})  # type: ignore[arg-type]


def prompt(length: int, seed: int = 0) -> list[int]:
    return random.Random(seed).choices(range(1, NUM_TOKENS), k=length)


def going_on(
    length: int, max_new: int, alone: Callable[[list[int], int], list[int]] = text_alone
) -> list[int]:
    """A prompt whose text does not end before ``max_new`` tokens."""
    prompts = (prompt(length, seed) for seed in range(1000))
    return next(one for one in prompts if len(alone(one, max_new)) == max_new)


@pytest.mark.parametrize(
    ("tokens", "wanted", "words"),
    [
        ([], {}, "The prompt is empty"),
        ([1, NUM_TOKENS], {}, f"token {NUM_TOKENS}, and the model has 0 to {NUM_TOKENS - 1}"),
        ([-1, 1], {}, "token -1"),
        ([1], {"logit_bias": {NUM_TOKENS: 1.0}}, f"logit_bias has token {NUM_TOKENS}"),
        ([1], {"allowed_tokens": (NUM_TOKENS,)}, "allowed_tokens"),
        ([1], {"stop_tokens": (-2,)}, "stop_tokens"),
        ([1], {"bad_words": ((1, NUM_TOKENS),)}, "bad_words"),
    ],
)
def test_a_sequence_that_cannot_be_computed(
    tokens: list[int], wanted: dict[str, object], words: str
) -> None:
    world = World(limits(vocabulary=NUM_TOKENS), 4)
    with pytest.raises(InvalidInputError, match=words):
        world.add(make(0, tokens, **wanted))
    assert not world.scheduler.has_work


@pytest.mark.parametrize(("context", "place"), [(100, "context of 100"), (None, "KV memory")])
def test_a_prompt_that_leaves_no_room(context: int | None, place: str) -> None:
    world = World(limits(context_tokens=context), 2)
    most = context or 2 * BLOCK_TOKENS
    with pytest.raises(PromptTooLongError, match=place) as raised:
        world.add(make(0, prompt(most)))
    assert (raised.value.num_tokens, raised.value.limit) == (most, most)
    # One token less has room for one to follow.
    world.add(make(1, prompt(most - 1), 50))
    world.drain(100)
    assert world.sequences[1].num_new == 1


def test_a_queue_that_is_full_refuses() -> None:
    world = World(limits(max_waiting=3, max_waiting_per_user=2), 4)
    world.add(make(0, [1], user="a"))
    world.add(make(1, [1], user="a"))
    with pytest.raises(BusyError, match="2 sequences of this user"):
        world.add(make(2, [1], user="a"))
    world.add(make(3, [1], user="b"))
    with pytest.raises(BusyError, match="3 sequences wait"):
        world.add(make(4, [1], user="c"))
    world.step()  # which admits them
    world.add(make(5, [1], user="a"))


def test_the_higher_priority_and_the_user_with_less_go_first() -> None:
    world = World(limits(max_running=1), 8)
    world.add(make(0, prompt(200), 3, user="a"))
    world.step()
    for id, user, priority in [(1, "a", 0), (2, "b", 0), (3, "a", 0), (4, "c", 1)]:  # noqa: A001
        world.add(make(id, prompt(5, seed=id), 1, user=user, priority=priority))
    order = []
    while world.scheduler.has_work:
        order += [one.id for one in world.step().sequences if one.id and one.id not in order]
    assert order == [4, 2, 1, 3]


def test_continuations_compute_their_prompt_once() -> None:
    world = World(limits(), 40)
    text = prompt(200)
    for id in range(4):  # noqa: A001
        world.add(make(id, text, 5))
    first = world.step()
    assert [span.num_rows for span in first.batch.spans] == [200]  # type: ignore[union-attr]
    second = world.step()
    # The last 8 tokens of the prompt, which fill no block, are computed by each.
    rows = {span.sequence: span.num_rows for span in second.batch.spans}  # type: ignore[union-attr]
    assert rows == {0: 1, 1: 8, 2: 8, 3: 8}
    assert world.scheduler.stats.prefix_hits == 3 * 192
    assert world.scheduler.stats.prefix_queries == 4 * 200
    # Three blocks are shared, and each has one of its own.
    assert world.pool.num_blocks - world.pool.num_free == 3 + 4


def test_continuations_go_on_without_the_one_that_computed_their_prompt() -> None:
    world = World(limits(max_rows=64), 40)
    for id in range(3):  # noqa: A001
        world.add(make(id, prompt(200), 2))
    world.step()
    assert world.scheduler.num_waiting == 2
    world.cancel(0)
    world.step()
    assert world.sequences[1].num_from_prefix == 64
    world.drain(50)
    world.check_texts()


def test_all_is_found_but_for_the_last_tokens() -> None:
    """Whichever chunk computed them."""
    world = World(limits(max_rows=70), 10)
    for id, length in enumerate([200, 193, 192]):  # noqa: A001
        world.add(make(id, prompt(200)[:length], 1))
        world.drain(9)
    assert [one.num_from_prefix for one in world.sequences.values()] == [0, 192, 190]


def test_equal_blocks_that_two_computed_are_kept_once() -> None:
    world = World(limits(), 10)
    for id in range(2):  # noqa: A001
        world.add(make(id, going_on(130, 5), 5, prompt_logprobs=0))  # finds no prefix
    world.step()
    first, second = (world.sequences[id].blocks for id in range(2))  # noqa: A001
    assert first[:2] == second[:2]
    assert first[2] != second[2]


@pytest.mark.parametrize(("length", "num_steps"), [(200, 3), (192, 2)])
def test_a_follower_waits_for_the_blocks_that_it_can_use(length: int, num_steps: int) -> None:
    """Never for the last one if its last token is in that, since it computes that in any case."""
    world = World(limits(max_rows=64), 10)
    for id in range(2):  # noqa: A001
        world.add(make(id, prompt(length), 2))
    for _ in range(num_steps):
        assert world.step().sequences == (world.sequences[0],)
    world.step()
    assert world.sequences[1].num_from_prefix == 64 * num_steps


def test_what_shares_no_prefix_waits_for_none() -> None:
    world = World(KINDS["hybrid"].limits(2), 10)
    for id in range(2):  # noqa: A001
        world.add(make(id, prompt(200), 2))
    world.step()
    assert world.scheduler.num_running == 2


def test_prompts_and_decoding_rows_that_do_not_mix_take_turns() -> None:
    world = World(KINDS["hybrid"].limits(4), 20)
    world.add(make(0, going_on(10, 30, recurrent_alone), 30))
    world.step()
    world.add(make(1, going_on(200, 30, recurrent_alone), 30))  # four chunks
    order = [[one.id for one in world.step().sequences] for _ in range(9)]
    assert order == [[0], [1], [0], [1], [0], [1], [0], [1], [0, 1]]


def test_a_finished_sequence_is_a_prefix_until_its_room_is_needed() -> None:
    world = World(limits(), 6)
    text = prompt(130)
    world.add(make(0, text, 1))
    world.drain(9)
    assert world.pool.num_kept == 2
    world.add(make(1, [*text, 5], 1))
    world.add(make(2, prompt(64 * 3 + 1, seed=1), 1))  # takes the blank ones
    world.drain(9)
    assert world.sequences[1].num_from_prefix == 128
    world.add(make(3, prompt(64 * 5 + 1, seed=2), 1))
    world.drain(9)
    world.add(make(4, text, 1))
    world.drain(9)
    assert world.sequences[4].num_from_prefix == 0


def test_the_last_token_is_computed_in_any_case() -> None:
    world = World(limits(), 10)
    for id in range(2):  # noqa: A001
        world.add(make(id, prompt(128), 3))
        world.drain(9)
    assert world.sequences[1].num_from_prefix == 126
    world.check_texts()


def test_a_block_that_is_only_in_part_the_same_is_copied() -> None:
    world = World(limits(), 20)
    text, other = prompt(230), prompt(60, seed=1)
    world.add(make(0, text, 1))
    world.drain(9)
    # One goes another way within the last block, which is not full; one within a full one.
    for id, begin in ((1, 220), (2, 100)):  # noqa: A001
        world.add(make(id, [*text[:begin], *other], 1))
        plan = world.plan()
        ((source, target),) = plan.copies
        assert target in world.sequences[id].blocks
        assert source not in world.sequences[id].blocks
        assert world.sequences[id].num_from_prefix == begin
        world.scheduler.done(world.compute(plan))
        world.scheduler.finish(id)
    # Of few tokens it is not worth it.
    world.add(make(3, [*text[: 64 + 7], *other], 1))
    assert not world.plan().copies
    assert world.sequences[3].num_from_prefix == 64


def test_an_equal_end_of_a_text_is_kept_once() -> None:
    world = World(limits(), 20)
    for id in range(3):  # noqa: A001
        world.add(make(id, prompt(100), 1))
        world.drain(9)
    assert world.pool.num_kept == 2


def test_equal_blocks_after_other_beginnings_are_others() -> None:
    world = World(limits(), 20)
    first, second, third = (prompt(64, seed) for seed in range(3))
    for id, text in enumerate([first + second, second, third + second, first + third]):  # noqa: A001
        world.add(make(id, [*text, 1], 3))
        world.drain(9)
    assert [one.num_from_prefix for one in world.sequences.values()] == [0, 0, 0, 64]
    world.check_texts()


def test_another_salt_shares_nothing() -> None:
    world = World(limits(), 10)
    asked = GenerationSettings(max_new_tokens=1)
    for id, salt in enumerate(["", "other", "other", "x" * 1000, "x" * 999 + "y", "x" * 65]):  # noqa: A001
        world.add(Sequence(id, prompt(100), asked, Origin(salt=salt)))
        world.drain(9)
    assert [one.num_from_prefix for one in world.sequences.values()] == [0, 0, 98, 0, 0, 0]


def test_a_prompt_past_the_turning_point_is_never_computed_as_a_short_one() -> None:
    world = World(limits(max_rows=64, turning_point=100), 10)
    world.add(make(0, prompt(150), 1))
    rows = [world.step().batch.num_rows for _ in range(2)]  # type: ignore[union-attr]
    assert rows == [128, 22]
    world.check_texts()


def test_a_prompt_waits_for_no_longer_than_the_pause() -> None:
    world = World(limits(pause_ms=300.0), 60)
    world.add(make(0, [1, 2], 50))
    world.step()
    world.add(make(1, prompt(2000), 1))
    spans = world.step(ms_per_row=2.0).batch.spans  # type: ignore[union-attr]
    assert [span.num_rows for span in spans] == [1, 128]  # 150 rows less one, in whole blocks
    spans = world.step(ms_per_row=1000.0).batch.spans  # type: ignore[union-attr]
    assert [span.num_rows for span in spans] == [1, 64]
    world.cancel(0)
    # Nobody waits: as many rows as a batch may have.
    spans = world.step(ms_per_row=1000.0).batch.spans  # type: ignore[union-attr]
    assert [span.num_rows for span in spans] == [512]


def test_a_sequence_gives_way_and_finds_its_prefix_again() -> None:
    world = World(limits(), 4)
    world.add(make(0, going_on(63, 80), 80))
    world.add(make(1, going_on(120, 80), 80))
    preempted: list[int] = []
    while world.scheduler.has_work:
        preempted += world.step().preempted
    assert preempted
    assert set(preempted) == {1}  # the later one
    assert world.scheduler.stats.num_preemptions == len(preempted)
    # The other one took the last of its blocks, none of those before.
    assert world.sequences[1].num_from_prefix == 64
    world.check_texts()


def test_a_sequence_is_admitted_once_each_running_one_has_a_block_left() -> None:
    world = World(limits(), 3)
    world.add(make(0, going_on(60, 9), 9))
    world.step()
    world.add(make(1, prompt(100), 1))  # two blocks
    world.step()
    assert world.scheduler.num_waiting == 1
    world.drain(20)
    assert world.scheduler.stats.num_preemptions == 0


def test_logits_of_a_prompt_are_wanted_once_and_for_all_its_rows() -> None:
    world = World(limits(), 10)
    for id, asked in enumerate([None, 0]):  # noqa: A001
        world.add(make(id, prompt(100), 3, prompt_logprobs=asked))
        spans = world.step().batch.spans  # type: ignore[union-attr]
        wanted = [span.wanted for span in spans if span.sequence == id]
        assert wanted == [Wanted.LAST if asked is None else Wanted.ALL]
        assert spans[-1].num_rows == 100  # the prefix that the second would find gives no logits
        spans = world.step().batch.spans  # type: ignore[union-attr]
        assert {span.wanted for span in spans} == {Wanted.LAST}
        world.cancel(id)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"max_rows": 0}, "max_rows is 0"),
        ({"pause_ms": float("nan")}, "pause_ms is nan"),
        ({"replays_rows": True}, "mixed=False"),
        ({"replays_rows": True, "mixed": False, "max_rows": 64}, "at least 65"),
    ],
)
def test_limits_that_make_no_sense(values: dict[str, object], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        limits(**values)


def test_no_pool_without_blocks() -> None:
    with pytest.raises(InvalidInputError, match="at least one"):
        BlockPool(0)


def test_the_seed_alone_says_how_a_continuation_goes() -> None:
    asked = GenerationSettings(seed=7)
    assert Sequence(0, [1], asked).seed == Sequence(5, [2], asked).seed == 7
    assert Sequence(0, [1], asked, Origin(continuation=1)).seed != 7
    unasked = GenerationSettings()
    assert Sequence(0, [1], unasked).seed != Sequence(1, [1], unasked).seed


def test_a_turn_of_a_sequence_that_gives_way_goes_to_another() -> None:
    """The only span of a step in turns may be of the sequence that is preempted for a block."""
    world = World(KINDS["in turns"].limits(8), 4)
    world.add(make(0, going_on(40, 50, recurrent_alone), 50))
    world.add(make(1, going_on(100, 60, recurrent_alone), 60))
    world.drain(1000)
    world.check_texts()
    assert world.scheduler.stats.num_preemptions
