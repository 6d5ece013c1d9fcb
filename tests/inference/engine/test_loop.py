"""The engine's step: a sequence's text is the same alone and among others, whatever happens."""

from dataclasses import dataclass, field
from typing import Any, ClassVar

from hypothesis import settings as limited
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from expertd_inference.device.transaction import StepLostError
from expertd_inference.engine.budget import EngineLimits, scheduler_limits
from expertd_inference.engine.channel import Channel
from expertd_inference.engine.live import live_of
from expertd_inference.engine.loop import Loop
from expertd_inference.engine.scheduler import Scheduler
from expertd_inference.engine.sequence import Sequence
from expertd_inference.engine.stops import TextPiece, TokenText
from expertd_inference.engine.token import Opening, Token
from expertd_inference.engine.wishes import resolve
from expertd_inference.execution.batch import Batch
from expertd_inference.execution.room import Room
from expertd_inference.kv.pool import BlockPool
from expertd_inference.settings import GenerationSettings
from expertstore.errors import (
    ExpertdError,
    PreconditionError,
    RecordLostError,
    SequenceFailedError,
    StepFailedError,
    UnavailableError,
)
from tests.inference.engine.toy import ToyWorker

SETTINGS = st.builds(
    GenerationSettings,
    max_new_tokens=st.integers(1, 120),
    temperature=st.sampled_from([0.0, 0.8, 2.0]),
    top_p=st.sampled_from([None, 0.9]),
    top_k=st.sampled_from([None, 20]),
    seed=st.integers(0, 5),
    stop=st.sampled_from([(), ("e",), ("th", "a")]),
    ignore_eos=st.booleans(),
    logprobs=st.sampled_from([None, 0, 2]),
    prompt_logprobs=st.sampled_from([None, None, 1]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
)
PROMPTS = st.builds(
    # Few beginnings, so that many prompts share blocks.
    lambda first, repeats, last: [first] * repeats + last,
    st.integers(0, 1),
    st.sampled_from([0, 1, 63, 64, 65, 128, 190]),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
)
FAULTS = [
    lambda: StepLostError("lost"),
    lambda: RecordLostError("damaged", experts=[(0, 0)]),
    lambda: RuntimeError("unforeseen"),
    lambda: UnavailableError("The daemon is gone."),
    lambda: PreconditionError("The model was unloaded."),
]
OF_THE_STEP = {RecordLostError: RecordLostError, RuntimeError: StepFailedError}
OF_ALL = (UnavailableError, PreconditionError)


class Rig:
    """A loop over a toy executor, and its parts."""

    def __init__(self, room: Room, max_waiting: int = 1024, **kind: bool) -> None:
        self.worker = ToyWorker(**kind)
        self.executor = self.worker.open_executor(room)
        self.pool = BlockPool(room.num_blocks)
        limits = scheduler_limits(
            EngineLimits(max_waiting=max_waiting), room, self.executor, self.worker
        )
        self.loop = Loop(self.executor, Scheduler(limits, self.pool))
        self.num_clients = 0

    def submit(
        self, prompt: list[int], settings: GenerationSettings, text: type[TokenText] = TokenText
    ) -> "Client":
        sequence = Sequence(self.num_clients, prompt, settings)
        self.num_clients += 1
        channel: Channel[Token] = Channel()
        wishes = resolve(settings, self.worker, prompt)
        self.loop.add(
            sequence,
            lambda: live_of(
                sequence, channel, self.worker.tokenizer, wishes.sampling, wishes.end_tokens
            ),
        ).text.__class__ = text
        return Client(sequence, channel)


@dataclass
class Client:
    sequence: Sequence
    channel: Channel[Token]
    tokens: list[Token] = field(default_factory=list)
    opening: Opening | None = None
    cancelled: bool = False
    error: ExpertdError | None = None

    @property
    def prompt_logprobs(self) -> Any:
        return None if self.opening is None else self.opening.prompt_logprobs

    @property
    def ended(self) -> bool:
        return self.cancelled or self.error is not None or self.channel.ended

    def read(self) -> None:
        """What has come."""
        try:
            while self.channel.num_waiting or self.channel.ended:
                token = self.channel.receive()
                if token is None:
                    return
                self.opening = token.opening or self.opening
                self.tokens.append(token)
        except ExpertdError as error:
            self.error = error

    def alone(self) -> "Client":
        """The same, with nothing else in a large pool."""
        rig = Rig(Room(20, 1, 1000))
        client = rig.submit(self.sequence.tokens[: self.sequence.num_prompt],
                            self.sequence.settings)  # fmt: skip
        # As much as it had room for.
        client.sequence.max_new_tokens = self.sequence.max_new_tokens
        while rig.loop.step():
            pass
        client.read()
        return client


class World(RuleBasedStateMachine):
    """Clients come, go, and are met by faults of the executor, between any two steps."""

    kind: ClassVar[dict[str, bool]] = {}

    @initialize(num_blocks=st.integers(5, 12), num_sequences=st.integers(1, 5))
    def start(self, num_blocks: int, num_sequences: int) -> None:
        self.rig = Rig(Room(num_blocks, num_sequences, 130), **self.kind)
        self.clients: list[Client] = []

    @rule(prompt=PROMPTS, settings=SETTINGS)
    def submit(self, prompt: list[int], settings: GenerationSettings) -> None:
        self.clients.append(self.rig.submit(prompt, settings))

    @precondition(lambda self: any(not client.ended for client in self.clients))
    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        client = data.draw(st.sampled_from([one for one in self.clients if not one.ended]))
        client.cancelled = True
        self.rig.loop.cancel(client.sequence.id)

    @rule(num=st.integers(1, 60))
    def steps(self, num: int) -> None:
        for _ in range(num):
            self.rig.loop.step()

    @rule()
    def read(self) -> None:
        for client in self.clients:
            client.read()

    @rule(fault=st.sampled_from(FAULTS))
    def fail(self, fault: Any) -> None:
        """The next step meets it, and the sequences of that step alone end, or all."""
        error = fault()
        alive = {one.sequence.id: one for one in self.clients if not one.ended}
        in_step: list[int] = []
        self.rig.executor.before = lambda batch: in_step.extend(
            span.sequence for span in batch.spans
        )
        self.rig.executor.faults = [error]
        computed = self.rig.loop.step()
        self.rig.executor.faults = []
        self.rig.executor.before = lambda _: None
        self.read()
        failed = {id_ for id_, one in alive.items() if one.error is not None}
        if not computed or isinstance(error, StepLostError):
            assert not failed
            return
        # Sequences that fail together are tried alone, where this fault is gone.
        tried = len({*in_step}) > 1 and not self.rig.executor.recurrent
        lasts = set() if tried else {*in_step}
        assert failed == set(alive if isinstance(error, OF_ALL) else lasts)
        expected = OF_THE_STEP.get(type(error), type(error))
        assert {type(alive[id_].error) for id_ in failed} <= {expected}

    @precondition(lambda self: any(not client.ended for client in self.clients))
    @rule(data=st.data(), fault=st.sampled_from(FAULTS[1:3]))
    def fail_with(self, data: st.DataObject, fault: Any) -> None:
        """Every step that has one of the sequences fails: that one ends, and no other.

        But that of recurrent layers, whose states may have gone on.
        """
        alive = {one.sequence.id: one for one in self.clients if not one.ended}
        victim = data.draw(st.sampled_from([*alive]))
        steps: list[set[int]] = []

        def meet(batch: Batch) -> None:
            steps.append({span.sequence for span in batch.spans})
            if victim in steps[-1]:
                raise fault()

        self.rig.executor.before = meet
        self.rig.loop.step()
        self.rig.executor.before = lambda _: None
        self.read()
        failed = {id_ for id_, one in alive.items() if one.error is not None}
        blamed = steps[0] if self.rig.executor.recurrent and steps else {victim}
        assert failed == (blamed if steps and victim in steps[0] else set())
        if failed and isinstance(fault(), RuntimeError):
            alone = blamed == steps[0]
            assert type(alive[victim].error) is (StepFailedError if alone else SequenceFailedError)

    @invariant()
    def forgets_what_has_ended(self) -> None:
        if not hasattr(self, "rig"):
            return
        alive = sum(not one.ended for one in self.clients)
        assert repr(self.rig.loop).startswith(f"<Loop of {alive} sequences")

    def teardown(self) -> None:
        if not hasattr(self, "rig"):
            return
        while self.rig.loop.step():
            pass
        self.read()
        assert self.rig.pool.num_free == self.rig.pool.num_blocks
        for client in self.clients:
            assert client.ended
            alone = client.alone()
            if client.cancelled or client.error is not None:
                assert alone.tokens[: len(client.tokens)] == client.tokens
            else:
                assert alone.tokens == client.tokens
                assert client.tokens[-1].finish_reason is not None
                assert client.prompt_logprobs == alone.prompt_logprobs


class Batched(World):
    pass


class Recurrent(World):
    kind: ClassVar = {"shares_prefixes": False, "recurrent": True}


class InTurns(World):
    kind: ClassVar = {"shares_prefixes": False}


for kind in (Batched, Recurrent, InTurns):
    kind.TestCase.settings = limited(max_examples=15, stateful_step_count=20)
TestBatched = Batched.TestCase
TestRecurrent = Recurrent.TestCase
TestInTurns = InTurns.TestCase


class Garbled(TokenText):
    """A text of which nothing can be made."""

    def feed(self, token: int, *, ends: bool = False) -> TextPiece:
        raise RuntimeError("no such letter")


def test_a_text_that_fails_ends_its_sequence_alone() -> None:
    rig = Rig(Room(20, 2, 1000))
    settings = GenerationSettings(max_new_tokens=5, ignore_eos=True)
    bad, good = rig.submit([1, 2], settings, Garbled), rig.submit([3], settings)
    while rig.loop.step():
        pass
    bad.read()
    good.read()
    assert type(bad.error) is SequenceFailedError
    assert "no such letter" in str(bad.error)
    assert len(good.tokens) == 5


def test_an_error_of_the_store_that_comes_when_sequences_are_tried_alone_ends_all() -> None:
    rig = Rig(Room(20, 2, 1000))
    settings = GenerationSettings(max_new_tokens=5, ignore_eos=True)
    clients = [rig.submit([number], settings) for number in range(3)]
    rig.executor.faults = [RuntimeError("unforeseen"), UnavailableError("The daemon is gone.")]
    rig.loop.step()
    for client in clients:
        client.read()
        assert type(client.error) is UnavailableError
    # The others would wait for the daemon each in turn.
    assert rig.executor.num_rows == [2, 1]


def test_a_step_with_which_all_fail_is_the_engines_fault() -> None:
    rig = Rig(Room(20, 2, 1000))
    settings = GenerationSettings(max_new_tokens=5, ignore_eos=True)
    clients = [rig.submit([number], settings) for number in range(2)]
    rig.executor.faults = [RuntimeError("unforeseen")] * 3
    rig.loop.step()
    for client in clients:
        client.read()
        assert type(client.error) is StepFailedError


def test_a_copy_that_is_lost_is_made_again() -> None:
    rig = Rig(Room(num_blocks=20, num_sequences=4, num_rows=100))
    copy, made = rig.executor.copy_block, list[tuple[int, int]]()

    def copy_block(source: int, target: int) -> None:
        made.append((source, target))
        if len(made) == 1:
            raise StepLostError("lost")
        copy(source, target)

    rig.executor.copy_block = copy_block  # type: ignore[method-assign]
    settings = GenerationSettings(max_new_tokens=4, temperature=0.0, ignore_eos=True)
    clients = []
    for last in (1, 2):
        clients.append(rig.submit([1] * 40 + [last] * 9, settings))
        while rig.loop.step():
            pass
    assert made[0] == made[1]
    assert len(made) == 2
    for client in clients:
        client.read()
        assert client.ended
        assert client.tokens == client.alone().tokens
    assert clients[1].opening is not None
    assert clients[1].opening.num_cached_tokens == 40


def test_a_step_of_recurrent_layers_is_not_tried_again() -> None:
    rig = Rig(Room(20, 2, 1000), shares_prefixes=False, recurrent=True)
    settings = GenerationSettings(max_new_tokens=50, ignore_eos=True)
    clients = [rig.submit([number], settings) for number in range(2)]
    while not all(client.tokens for client in clients):
        rig.loop.step()
        for client in clients:
            client.read()
    rig.executor.faults = [RuntimeError("unforeseen")]
    rig.loop.step()
    for client in clients:
        client.read()
        assert type(client.error) is StepFailedError
