"""Sequences among the engines of one model, which here are played by the test."""

import asyncio
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from msgspec import structs

from expertd_inference.engine.budget import EngineLimits
from expertd_inference.engine.stops import FinishReason
from expertd_inference.engine.stream import TokenStream
from expertd_inference.engine.token import Token
from expertd_inference.server.accounts import Accounts
from expertd_inference.server.hosting import engine_seat
from expertd_inference.server.hosting.engine_child import EngineSpec
from expertd_inference.server.hosting.hosted_model import HostedModel
from expertd_inference.server.hosting.messages import Begin, Cancel, Failure, Progress, Ready
from expertd_inference.server.metrics import ServerMetrics
from expertd_inference.settings import GenerationSettings
from expertstore.errors import ExpertdError, PreconditionError, UnavailableError
from tests.inference.server.hosting import pretended

PLACES = 2
SETTINGS = GenerationSettings(max_new_tokens=8, seed=0)
STATS = structs.replace(pretended.STATS, kv_tokens=6400)


@dataclass(eq=False)
class Played:
    """An engine's process, in the test's hands."""

    on_progress: Callable[[Progress], None]
    place: str
    ready: Ready = field(default_factory=lambda: Ready("program", "", "native", 10, 6400, STATS))
    said: list[Begin | Cancel] = field(default_factory=list)
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    pid: int = 1
    fate: str = "ended"

    def send(self, message: Begin | Cancel) -> None:
        self.said.append(message)

    def abandon(self) -> None:
        self.ended.set()

    async def close(self) -> None:
        self.ended.set()

    @property
    def begun(self) -> list[Begin]:
        """What it was told to compute and not to cancel, in that order."""
        cancelled = {one.id for one in self.said if isinstance(one, Cancel)}
        return [one for one in self.said if isinstance(one, Begin) and one.id not in cancelled]

    def token(self, begin: Begin, token: int) -> None:
        self.on_progress(Progress([(begin.id, Token(token, str(token)))], []))

    def end(self, begin: Begin, failure: Failure | None = None) -> None:
        self.on_progress(Progress([], [(begin.id, failure)]))


@pytest.fixture
def engines(monkeypatch: pytest.MonkeyPatch) -> dict[str, Played | ExpertdError]:
    """The engine that runs at each place; one that a test puts an error for does not start."""
    found: dict[str, Played | ExpertdError] = {}

    class Starting(Played):
        @classmethod
        async def start(cls, spec: EngineSpec, on_progress: Callable[[Progress], None]) -> Played:
            if isinstance(error := found.get(spec.place), ExpertdError):
                raise error
            found[spec.place] = engine = cls(on_progress, spec.place)
            return engine

    monkeypatch.setattr(engine_seat, "EngineProcess", Starting)
    monkeypatch.setattr(engine_seat, "RETRY_SECONDS", 0.0)
    return found


@dataclass
class Hosted:
    """A model of two engines, at the places ``cpu 0`` and ``cpu 1``."""

    engines: dict[str, Played | ExpertdError]
    reattach_seconds: float = 0.0
    idle_seconds: float | None = None

    async def __aenter__(self) -> "Hosted":
        self.said: list[str] = []
        limits = EngineLimits(max_sequences=PLACES)
        specs = [
            EngineSpec(
                model="m",
                socket=None,
                cores=(core,),
                limits=limits,
                reattach_seconds=self.reattach_seconds,
            )
            for core in range(2)
        ]
        self.model = HostedModel(
            specs,
            accounts=Accounts(),
            metrics=ServerMetrics(),
            idle_seconds=self.idle_seconds,
            say=self.said.append,
        )
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.model.close()

    def engine(self, core: int) -> Played:
        engine = self.engines[f"cpu {core}"]
        assert isinstance(engine, Played)
        return engine

    @property
    def begun(self) -> tuple[list[list[int]], list[list[int]]]:
        """What each engine was told to continue, and not to cancel: prompt and tokens so far."""
        first, second = (
            [[*one.tokens, *one.origin.generated] for one in self.engine(core).begun]
            for core in range(2)
        )
        return first, second

    def ask(self, *tokens: int) -> TokenStream:
        return self.model.submit(tokens, SETTINGS)


async def settle() -> None:
    """Lets tasks that have something to do do it."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_sequences_are_shared_out_before_and_after_engines_have_started(
    engines: dict[str, Played | ExpertdError],
) -> None:
    async with Hosted(engines) as hosted:
        streams = [hosted.ask(number) for number in range(2)]
        await hosted.model.ready()
        streams += [hosted.ask(number) for number in range(2, 4)]
        assert hosted.begun == ([[0], [2]], [[1], [3]])
        assert hosted.model.max_tokens == 6400
        del streams


async def test_a_conversation_stays_with_its_engine(
    engines: dict[str, Played | ExpertdError],
) -> None:
    async with Hosted(engines) as hosted:
        await hosted.model.ready()
        prompt = [*range(100)]
        with hosted.ask(*prompt):
            (begin,) = hosted.engine(0).begun
            for token in range(100, 192):
                hosted.engine(0).token(begin, token)
            hosted.engine(0).end(begin)
        other, busy = hosted.ask(7), hosted.ask(8)
        assert hosted.begun[1] == [[7]], "its memory is emptier"
        other.cancel()
        await settle()
        # The answer's blocks count as well: else the second engine, which is idle, would have it.
        more = hosted.ask(*range(192), 5)
        assert [len(tokens) for tokens in hosted.begun[0]] == [100, 1, 193]
        del busy, more


async def test_sequences_of_an_engine_that_died_go_on_in_the_other_at_once(
    engines: dict[str, Played | ExpertdError],
) -> None:
    async with Hosted(engines) as hosted:
        await hosted.model.ready()
        first, second = hosted.ask(1), hosted.ask(2)
        dead = hosted.engine(0)
        (begin,) = dead.begun
        dead.token(begin, 50)
        dead.ended.set()
        await settle()
        moved = hosted.engine(1).begun[1]
        assert (moved.tokens, moved.origin.generated) == ([1], (50,))
        assert hosted.engine(0) is not dead, "it has a successor"
        assert not hosted.engine(0).begun
        # What the dead one still had to say counts no more.
        dead.token(begin, 99)
        hosted.engine(1).on_progress(
            Progress([(moved.id, Token(51, "", finish_reason=FinishReason.LENGTH))], [])
        )
        hosted.engine(1).end(moved)
        assert [token.id async for token in first] == [50, 51]
        assert hosted.said == ["the engine of m ended; another one goes on with 1 sequences"]
        assert hosted.model.num_deaths == 1
        del second


async def test_a_lost_store_moves_sequences_and_another_error_ends_one(
    engines: dict[str, Played | ExpertdError],
) -> None:
    async with Hosted(engines) as hosted:
        await hosted.model.ready()
        streams = [hosted.ask(number) for number in range(3)]
        one, other = hosted.engine(0).begun
        hosted.engine(0).end(one, Failure("InvalidInputError", "no such token"))
        hosted.engine(0).end(other, Failure("DeviceLostError", "the GPU is gone"))
        await settle()
        assert hosted.begun == ([], [[1], [2]])
        with pytest.raises(ExpertdError, match="no such token"):
            await anext(streams[0])


async def test_what_an_engine_refuses_ends_one_whatever_the_error(
    engines: dict[str, Played | ExpertdError],
) -> None:
    async with Hosted(engines) as hosted:
        await hosted.model.ready()
        streams = [hosted.ask(number) for number in range(3)]
        one, other = hosted.engine(0).begun
        hosted.engine(0).end(one, Failure("PreconditionError", "not installed", refuses=True))
        hosted.engine(0).end(other, Failure("SequenceFailedError", "it fails alone"))
        await settle()
        assert hosted.model.num_deaths == 0
        for stream, why in ((streams[0], "not installed"), (streams[2], "it fails alone")):
            with pytest.raises(ExpertdError, match=why):
                await anext(stream)


async def test_what_ended_as_the_engine_was_lost_is_not_computed_again(
    engines: dict[str, Played | ExpertdError],
) -> None:
    async with Hosted(engines) as hosted:
        await hosted.model.ready()
        streams = [hosted.ask(number) for number in range(3)]
        one, other = hosted.engine(0).begun
        failure = Failure("DeviceLostError", "the GPU is gone")
        hosted.engine(0).on_progress(Progress([], [(one.id, failure), (other.id, None)]))
        await settle()
        assert [token async for token in streams[2]] == []
        assert hosted.model.num_deaths == 1
        assert hosted.begun == ([], [[1], [0]])


async def test_those_that_wait_take_places_that_become_free(
    engines: dict[str, Played | ExpertdError],
) -> None:
    async with Hosted(engines) as hosted:
        await hosted.model.ready()
        streams = [hosted.ask(number) for number in range(5)]
        assert hosted.begun == ([[0], [2], [4]], [[1], [3]])
        (_, _, waiting) = hosted.engine(0).begun
        hosted.engine(0).token(waiting, 60)
        streams[3].cancel()
        await settle()
        assert hosted.begun == ([[0], [4]], [[1], [2]]), "the last that has not begun"


async def test_what_an_engine_says_of_a_sequence_that_has_left_it_counts_no_more(
    engines: dict[str, Played | ExpertdError],
) -> None:
    async with Hosted(engines, reattach_seconds=60) as hosted:
        await hosted.model.ready()
        streams = [hosted.ask(number) for number in range(5)]
        waiting = hosted.engine(0).begun[-1]
        streams[3].cancel()
        await settle()
        hosted.engine(0).token(waiting, 98)
        other, engines["cpu 1"] = hosted.engine(1), UnavailableError("no successor")
        other.ended.set()
        await settle()
        # It is back, under another number.
        hosted.engine(0).token(waiting, 99)
        hosted.engine(0).end(waiting)
        assert [one.tokens for one in hosted.engine(0).begun] == [[0], [2], [1], [4]]
        hosted.engine(0).token(hosted.engine(0).begun[-1], 70)
        assert (await anext(streams[4])).id == 70


async def test_an_engine_that_does_not_start_leaves_its_sequences_to_the_other(
    engines: dict[str, Played | ExpertdError],
) -> None:
    engines["cpu 1"] = UnavailableError("no GPU")
    async with Hosted(engines, reattach_seconds=60) as hosted:
        streams = [hosted.ask(number) for number in range(2)]
        await settle()
        assert [one.tokens for one in hosted.engine(0).begun] == [[0], [1]]
        del engines["cpu 1"]
        await settle()
        assert hosted.begun[1] == []
        del streams


async def test_without_any_engine_sequences_end_with_the_error(
    engines: dict[str, Played | ExpertdError],
) -> None:
    engines["cpu 0"], engines["cpu 1"] = UnavailableError("no daemon"), UnavailableError("no GPU")
    async with Hosted(engines) as hosted:
        streams = [hosted.ask(number) for number in range(2)]
        for stream in streams:
            with pytest.raises(UnavailableError, match="no "):
                await anext(stream)
        with pytest.raises(UnavailableError):
            await hosted.model.ready()


async def test_all_engines_end_when_the_model_is_idle(
    engines: dict[str, Played | ExpertdError],
) -> None:
    async with Hosted(engines, idle_seconds=0.0) as hosted:
        stream = hosted.ask(1)
        await settle()
        first = hosted.engine(0)
        await settle()
        assert hosted.engine(0) is first, "it has something to do"
        stream.cancel()
        # A look each second, as long as there is something to do.
        async with asyncio.timeout(20):
            while hosted.model.num_engines:  # noqa: ASYNC110
                await asyncio.sleep(0.05)
        assert hosted.model.num_deaths == 0


async def test_the_end_of_the_server_ends_streams(
    engines: dict[str, Played | ExpertdError],
) -> None:
    async with Hosted(engines) as hosted:
        stream = hosted.ask(1)
        await settle()
    with pytest.raises(PreconditionError, match="stopping"):
        await anext(stream)
