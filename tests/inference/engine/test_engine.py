"""The engine as its clients meet it: threads, event loops, and what goes wrong."""

import asyncio
import gc
import multiprocessing
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from expertd_inference.engine.budget import EngineLimits, budget_for
from expertd_inference.engine.engine import Engine
from expertd_inference.engine.stops import FinishReason
from expertd_inference.execution.batch import Batch
from expertd_inference.execution.room import Room
from expertd_inference.experts.adapting import Adapter
from expertd_inference.fewer_experts import FewerExperts
from expertd_inference.kv.pool import num_blocks_of
from expertd_inference.kv.size import CONTEXT_TOKENS
from expertd_inference.settings import GenerationSettings
from expertd_testing.patience import HANG_SECONDS
from expertstore.errors import (
    BusyError,
    InvalidInputError,
    PackError,
    PreconditionError,
    PromptTooLongError,
    SettingError,
    StepFailedError,
    UnavailableError,
)
from tests.inference.engine.toy import ToyExecutor, ToyWorker

LONG = GenerationSettings(max_new_tokens=400, ignore_eos=True)
SHORT = GenerationSettings(max_new_tokens=5, ignore_eos=True)


class Gate:
    """Lets an executor compute so many steps."""

    def __init__(self, worker: ToyWorker) -> None:
        self._steps = threading.Semaphore(0)
        self.begun = threading.Semaphore(0)
        self.batches: list[Batch] = []
        worker.executor.before = self._wait

    def _wait(self, batch: Batch) -> None:
        self.batches.append(batch)
        self.begun.release()
        assert self._steps.acquire(timeout=HANG_SECONDS)

    def let(self, num_steps: int) -> None:
        self._steps.release(num_steps)

    def sequences(self) -> list[set[int]]:
        return [{span.sequence for span in batch.spans} for batch in self.batches]


@pytest.fixture
def worker() -> ToyWorker:
    return ToyWorker()


@pytest.fixture
def engine(worker: ToyWorker) -> Iterator[Engine]:
    with Engine(worker, EngineLimits(max_sequences=4, kv_tokens=2048)) as engine:
        yield engine


@pytest.fixture
def gate(worker: ToyWorker, engine: Engine) -> Iterator[Gate]:
    gate = Gate(worker)
    yield gate
    gate.let(10_000)


def ids(stream: Any) -> list[int]:
    return [token.id for token in stream]


def test_a_text_comes_token_by_token(worker: ToyWorker, engine: Engine) -> None:
    stream = engine.submit("Once", SHORT)
    assert stream.num_prompt_tokens == 4
    tokens = list(stream)
    assert len(tokens) == 5
    assert [token.finish_reason for token in tokens] == [None] * 4 + [FinishReason.LENGTH]
    assert stream.finish_reason is FinishReason.LENGTH
    assert list(stream) == []
    assert ids(engine.submit(worker.encode("Once"), SHORT)) == [token.id for token in tokens]


async def test_async_readers_share_steps(engine: Engine) -> None:
    async def read(prompt: str) -> list[int]:
        return [token.id async for token in engine.submit(prompt, SHORT)]

    prompts = ["a", "b", "c", "d"]
    together = await asyncio.wait_for(asyncio.gather(*map(read, prompts)), HANG_SECONDS)
    assert together == [ids(engine.submit(prompt, SHORT)) for prompt in prompts]
    assert engine.stats.rows_mean > 1


def test_all_prompts_at_once(worker: ToyWorker) -> None:
    prompts = [f"prompt {number}" for number in range(9)]
    # More than may wait.
    with Engine(worker, EngineLimits(max_sequences=2, max_waiting=2, kv_tokens=512)) as engine:
        done = engine.generate(prompts, SHORT)
        alone = [list(engine.submit(prompt, SHORT)) for prompt in prompts]
        assert engine.generate([worker.encode("prompt 3")], SHORT) == [done[3]]
        assert engine.generate([]) == []
        assert engine.stats.rows_mean > 1
    assert [list(one.tokens) for one in done] == alone
    assert [one.text for one in done] == ["".join(x.text for x in tokens) for tokens in alone]
    assert {(one.finish_reason, one.num_prompt_tokens) for one in done} == {("length", 8)}
    assert done[0].prompt_logprobs is None


def test_one_of_all_prompts_that_fails_cancels_the_others(engine: Engine, gate: Gate) -> None:
    gate.let(10_000)
    with pytest.raises(InvalidInputError, match="prompt is empty"):
        engine.generate(["a", "b", []], LONG)
    assert len(ids(engine.submit("c", SHORT))) == 5
    assert engine.stats.num_running == 0


def test_token_ids_of_other_kinds(engine: Engine) -> None:
    expected = engine.generate([[1, 2, 3]], SHORT)
    for prompt in ((1, 2, 3), range(1, 4), np.array([1, 2, 3]), torch.tensor([1, 2, 3])):
        assert engine.generate([prompt], SHORT) == expected  # type: ignore[list-item]
    assert engine.generate((one for one in ([1, 2, 3],)), SHORT) == expected  # type: ignore[arg-type]


def test_settings_that_are_none(engine: Engine) -> None:
    with pytest.raises(
        InvalidInputError, match="settings are of type dict; give GenerationSettings"
    ):
        engine.submit("a", {"temperature": 1})  # type: ignore[arg-type]


def test_no_memory_for_so_many_rows() -> None:
    class Small(ToyWorker):
        def open_executor(self, room: Room) -> ToyExecutor:
            torch.empty(1 << 62, dtype=torch.int8)
            raise AssertionError("so much memory")

    with pytest.raises(InvalidInputError, match=r"steps of 512 rows and 64 sequences; ask for"):
        Engine(Small())


def test_a_pack_without_a_tokenizer(worker: ToyWorker, engine: Engine) -> None:
    class NoTokenizer:
        @property
        def backend_tokenizer(self) -> None:
            raise PackError("It has no usable tokenizer.")

    tokenizer, worker.tokenizer = worker.tokenizer, NoTokenizer()
    with pytest.raises(PackError, match="no usable tokenizer"):
        engine.submit([1, 2], SHORT)
    assert engine.stats.num_waiting == 0
    worker.tokenizer = tokenizer
    assert len(ids(engine.submit([1, 2], SHORT))) == 5


def test_a_closed_engine_is_forgotten(worker: ToyWorker) -> None:
    for _ in range(2):
        with Engine(worker):
            assert worker.closing
        assert not worker.closing


@pytest.mark.parametrize("prompts", [None, "one", [1, 2], [{"role": "user", "content": "one"}]])
def test_a_prompt_is_no_list_of_prompts(engine: Engine, prompts: Any) -> None:
    with pytest.raises(InvalidInputError, match="put a single one in a list"):
        engine.generate(prompts)


def test_what_was_done_is_counted(engine: Engine) -> None:
    list(engine.submit("x" * 200, SHORT))
    list(engine.submit("x" * 200, SHORT))
    stats = engine.stats
    assert (stats.executor, stats.reason) == ("toy", "a test asked for it")
    assert stats.num_steps == 10
    assert stats.rows_mean == (2 * 200 + 2 * 4 - 192) / 10
    assert (stats.prefix_queries, stats.prefix_hits) == (400, 192)
    assert (stats.kv_tokens, stats.kv_why) == (2048, "as told")
    assert (stats.num_running, stats.num_waiting, stats.num_preemptions) == (0, 0, 0)
    assert stats.native_rows == {"a form": 32}


def test_a_reader_that_stops_reading_stops_nothing(engine: Engine) -> None:
    unread = engine.submit("unread", LONG)
    assert len(ids(engine.submit("read", LONG))) == 400
    # What was not read is kept, and it is no more than its settings say.
    tokens = ids(unread)
    assert len(tokens) == 400


def test_cancelled_before_the_next_step(engine: Engine, gate: Gate) -> None:
    first, second = engine.submit("a", LONG), engine.submit("b", LONG)
    gate.let(3)
    for _ in range(4):
        assert gate.begun.acquire(timeout=HANG_SECONDS)
    engine.cancel(first)
    assert list(first) == [], "what was not read is dropped"
    gate.let(2)
    for _ in range(2):
        assert gate.begun.acquire(timeout=HANG_SECONDS)
    assert [1 in ids for ids in gate.sequences()][-2:] == [True, True]
    assert [0 in ids for ids in gate.sequences()][-2:] == [False, False]
    second.cancel()
    second.cancel()


def test_a_stream_that_nobody_has_is_cancelled(engine: Engine, gate: Gate) -> None:
    def drop() -> None:
        next(iter(engine.submit("a", LONG)))

    gate.let(1)
    drop()
    gc.collect()
    assert gate.begun.acquire(timeout=HANG_SECONDS)
    gate.let(10_000)
    assert len(ids(engine.submit("b", SHORT))) == 5
    assert sum(0 in ids for ids in gate.sequences()) <= 2


def test_the_end_of_a_block_cancels(engine: Engine, gate: Gate) -> None:
    gate.let(2)
    with engine.submit("a", LONG) as stream:
        next(stream)
    gate.let(10_000)
    assert len(ids(engine.submit("b", SHORT))) == 5
    assert sum(0 in ids for ids in gate.sequences()) <= 3


async def test_the_end_of_an_async_block_cancels(engine: Engine, gate: Gate) -> None:
    gate.let(2)
    async with engine.submit("a", LONG) as stream:
        await anext(stream)
    gate.let(10_000)
    assert len(await asyncio.to_thread(ids, engine.submit("b", SHORT))) == 5
    assert sum(0 in ids for ids in gate.sequences()) <= 3


def test_a_reader_that_is_interrupted_cancels(
    engine: Engine, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted() -> None:
        raise KeyboardInterrupt

    stream = engine.submit("a", LONG)
    monkeypatch.setattr(stream._channel, "receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        next(stream)
    gate.let(10_000)
    assert len(ids(engine.submit("b", SHORT))) == 5
    assert sum(0 in ids for ids in gate.sequences()) <= 2


async def test_a_cancelled_task_cancels(engine: Engine, gate: Gate) -> None:
    stream = engine.submit("a", LONG)

    async def read() -> None:
        async for _ in stream:
            pass

    task = asyncio.create_task(read())
    gate.let(1)
    await asyncio.to_thread(gate.begun.acquire)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    gate.let(10_000)
    assert [token async for token in stream] == []
    assert len(await asyncio.to_thread(ids, engine.submit("b", SHORT))) == 5
    assert sum(0 in ids for ids in gate.sequences()) <= 3


def test_a_fault_of_a_step_ends_its_sequences(worker: ToyWorker, engine: Engine) -> None:
    worker.executor.faults = [RuntimeError("an odd tensor")]
    with pytest.raises(StepFailedError, match=r"an odd tensor.*please report") as raised:
        list(engine.submit("a", SHORT))
    assert isinstance(raised.value.__cause__, RuntimeError)
    assert len(ids(engine.submit("a", SHORT))) == 5


def test_a_daemon_that_is_gone_ends_all(engine: Engine, worker: ToyWorker, gate: Gate) -> None:
    # More than are computed at a time: the others would wait for a daemon each in turn.
    streams = [engine.submit(f"{number}", LONG) for number in range(7)]
    worker.executor.faults = [UnavailableError("The daemon is gone.")]
    gate.let(1)
    for stream in streams:
        with pytest.raises(UnavailableError, match="The daemon is gone"):
            list(stream)
    gate.let(10_000)
    assert len(ids(engine.submit("a", SHORT))) == 5, "once it is back"


def test_too_many(worker: ToyWorker) -> None:
    limits = EngineLimits(max_sequences=1, max_waiting=2, kv_tokens=512)
    with Engine(worker, limits) as engine:
        gate = Gate(worker)
        streams = [engine.submit("a", SHORT)]
        assert gate.begun.acquire(timeout=HANG_SECONDS)
        streams += [engine.submit("b", SHORT), engine.submit("c", SHORT)]
        with pytest.raises(BusyError, match="2 sequences wait already"):
            engine.submit("d", SHORT)
        gate.let(10_000)
        assert [len(ids(stream)) for stream in streams] == [5, 5, 5]
        assert len(ids(engine.submit("d", SHORT))) == 5


@pytest.mark.parametrize(
    ("prompt", "error", "message"),
    [
        ([], InvalidInputError, "prompt is empty"),
        ([1, 5000], InvalidInputError, "token 5000, and the model has 0 to 256"),
        ([1, -1], InvalidInputError, "token -1"),
        ([1] * 512, PromptTooLongError, "512 tokens, which leaves no room in the model's context"),
        ("x" * 512, PromptTooLongError, "512 tokens"),
        (None, InvalidInputError, r"this one is None \(NoneType\)"),
        (5, InvalidInputError, r"5 \(int\)"),
        (b"abc", InvalidInputError, r"\(bytes\)"),
        ([1.5], InvalidInputError, r"\[1.5\] \(list\)"),
        (["a"], InvalidInputError, r"\(list\)"),
        (torch.tensor([[1, 2]]), InvalidInputError, r"\(Tensor\)"),
    ],
    ids=lambda value: str(value)[:20],
)
def test_prompts_that_cannot_be_continued(
    engine: Engine, prompt: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        engine.submit(prompt)
    assert len(ids(engine.submit("a", SHORT))) == 5


def test_a_prompt_longer_than_the_pool(worker: ToyWorker) -> None:
    with (
        Engine(worker, EngineLimits(kv_tokens=128)) as engine,
        pytest.raises(
            PromptTooLongError,
            match=r"128 tokens, which leaves no room in the KV memory.* 128 in all",
        ),
    ):
        engine.submit([1] * 128)


@pytest.mark.parametrize("kv_tokens", [None, 128], ids=["context", "pool"])
def test_a_prompt_of_which_nothing_else_is_wanted_may_fill_all_room(
    worker: ToyWorker, kv_tokens: int | None
) -> None:
    most = kv_tokens or 512
    alone = GenerationSettings(max_new_tokens=1, prompt_only=True, prompt_logprobs=1)
    with Engine(worker, EngineLimits(kv_tokens=kv_tokens)) as engine:
        (token,) = engine.submit([1] * most, alone)
        assert token.finish_reason is FinishReason.LENGTH
        assert token.opening is not None
        assert len(token.opening.prompt_logprobs or ()) == most - 1
        with pytest.raises(PromptTooLongError, match=f"{most + 1} tokens"):
            engine.submit([1] * (most + 1), alone)


def test_settings_with_tokens_that_there_are_not(engine: Engine) -> None:
    with pytest.raises(SettingError, match="logit_bias has token 300, and the model has") as wrong:
        engine.submit("a", GenerationSettings(logit_bias={300: 1.0}))
    assert wrong.value.setting == "logit_bias"


def test_closing_ends_all(worker: ToyWorker) -> None:
    engine = Engine(worker, EngineLimits(max_sequences=1, kv_tokens=512))
    gate = Gate(worker)
    streams = [engine.submit("a", LONG), engine.submit("b", LONG)]
    assert gate.begun.acquire(timeout=HANG_SECONDS)
    closer = threading.Thread(target=worker.close)
    closer.start()
    gate.let(10_000)
    closer.join(HANG_SECONDS)
    assert worker.executor.closed
    assert len(gate.batches) == 1, "no step after the one that was computed"
    for stream in streams:
        with pytest.raises(PreconditionError, match="engine was closed"):
            list(stream)
    with pytest.raises(PreconditionError, match="engine was closed"):
        engine.submit("a")
    engine.close()


def test_a_fault_of_the_engine_closes_it(
    worker: ToyWorker, engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(threading, "excepthook", lambda _: None)
    monkeypatch.setattr(engine._loop._scheduler, "done", lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        list(engine.submit("a", SHORT))
    with pytest.raises(PreconditionError, match="engine was closed"):
        engine.submit("a")


def test_a_fork_has_no_engine(engine: Engine) -> None:
    def work(answers: Any) -> None:
        try:
            engine.submit("a")
        except PreconditionError as error:
            answers.send(str(error))

    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=work, args=(sender,))
    process.start()
    assert receiver.poll(HANG_SECONDS)
    assert "was loaded by process" in receiver.recv()
    process.join(HANG_SECONDS)


@pytest.mark.parametrize(
    "limits",
    [
        *({"max_sequences": 0}, {"max_waiting": 0}, {"kv_tokens": 63}, {"chunk_rows": 0}),
        *({"max_sequences": 1.5}, {"kv_tokens": float("nan")}, {"chunk_rows": "4"}),
        {"num_engines": 0},
    ],
    ids=str,
)
def test_limits_that_make_no_sense(limits: dict[str, Any]) -> None:
    with pytest.raises(InvalidInputError, match=next(iter(limits))):
        EngineLimits(**limits)


def test_room_for_keys_and_values(worker: ToyWorker) -> None:
    def room(kv_bytes: int, **limits: Any) -> tuple[Room, str]:
        worker.kv_bytes = kv_bytes
        budget = budget_for(EngineLimits(**limits), worker)
        return budget.room, budget.why

    assert room(1 << 40, max_sequences=3) == (Room(24, 3, 512), "3 sequences of 512 tokens")
    assert room(5 << 16) == (Room(5, 64, 512), "320.0 KiB of memory for keys and values")
    assert room(10 << 16, num_engines=2) == room(5 << 16)
    assert room(0, kv_tokens=200, chunk_rows=1) == (Room(3, 64, 128), "as told")
    # One block is enough.
    assert room(64_000)[0].num_blocks == room(0, kv_tokens=64)[0].num_blocks == 1
    worker.context_tokens = None
    num_blocks = 2 * num_blocks_of(CONTEXT_TOKENS)
    assert room(1 << 40, max_sequences=2)[0].num_blocks == num_blocks
    worker.context_tokens = 512
    with pytest.raises(InvalidInputError, match=r"64 tokens need 62\.5 KiB: free some memory"):
        room(1000)


def test_sequences_of_one_step_keep_their_own_numbers_of_experts(
    worker: ToyWorker, engine: Engine, gate: Gate
) -> None:
    kinds = [
        {},
        {"experts_per_token": 1},
        {"expert_threshold": 0.25},
        {"experts_per_token": 2, "expert_threshold": 0.0},
    ]
    streams = [engine.submit("abcdefgh" * 20, replace(SHORT, **kind)) for kind in kinds]
    gate.let(10_000)
    for stream in streams:
        assert len([*stream]) == 5
    kept = {span.sequence: span.fewer for batch in gate.batches for span in batch.spans}
    every = FewerExperts.of(None, 0.25)
    assert [kept[one] for one in sorted(kept)] == [None, FewerExperts(1), every, None]
    stats = engine.stats
    assert stats.prefix_hits == 128, "of the two that keep all; others have other keys"
    assert stats.experts_mean == 2
    worker.executor.tally.add(2 * stats.num_rows, 2 * stats.num_rows - 4)
    assert engine.stats.experts_mean == pytest.approx((2 * stats.num_rows - 4) / 2 / stats.num_rows)


def test_fewer_experts_where_a_request_does_not_say() -> None:
    worker = ToyWorker()
    spans = []
    with Engine(worker, EngineLimits(kv_tokens=2048, expert_threshold=0.5)) as engine:
        worker.executor.before = lambda batch: spans.extend(batch.spans)
        for settings in (SHORT, replace(SHORT, expert_threshold=0.0)):
            assert len([*engine.submit("abc", settings)]) == 5
    kept = {span.sequence: span.fewer for span in spans}
    assert [*kept.values()] == [FewerExperts.of(None, 0.5), None]


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("experts_per_token", 3, "is 3, and this model's routers choose 2; give 1 to 2."),
        ("experts_per_token", 0, "is 0; give at least 1."),
        ("expert_threshold", 1.5, "is 1.5; give 0 to 1, a share of a token's router weights."),
    ],
)
def test_more_experts_than_routers_choose(
    engine: Engine, field: str, value: float, said: str
) -> None:
    for refused in (
        lambda: engine.submit("abc", GenerationSettings(**{field: value})),
        lambda: Engine(ToyWorker(), EngineLimits(kv_tokens=2048, **{field: value})),
    ):
        with pytest.raises(SettingError) as caught:
            refused()
        assert (caught.value.setting, str(caught.value)) == (field, f"{field} {said}")


def test_sequences_share_prefixes_with_those_of_their_adapter_alone(
    worker: ToyWorker, engine: Engine
) -> None:
    opened = {name: Adapter(f"key {name}", {}, {}) for name in ("one", "two")}
    worker.adapters = SimpleNamespace(open=opened.__getitem__)
    spans = []
    worker.executor.before = lambda batch: spans.extend(batch.spans)
    for name in (None, "one", "two", "one"):
        assert len([*engine.submit("abcdefgh" * 20, replace(SHORT, adapter=name))]) == 5
    assert engine.stats.prefix_hits == 158, "of the last, in which two rows are left to compute"
    kept = {span.sequence: span.adapter for span in spans}
    assert [*kept.values()] == [None, opened["one"], opened["two"], opened["one"]]
