"""A model whose engines end in every way: whoever asks is answered, or told why not."""

import asyncio
import errno
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import pytest

from expertd_inference.engine.token import Token
from expertd_inference.server.hosting import engine_process
from expertd_inference.server.hosting.engine_process import EngineProcess
from expertd_inference.server.hosting.hosted_model import MAX_DEATHS, HostedModel
from expertd_inference.server.hosting.messages import Failure as Failed
from expertd_inference.server.hosting.messages import Pulse, Refused
from expertd_inference.settings import GenerationSettings
from expertd_testing.patience import HANG_SECONDS
from expertstore.errors import NotFoundError, PackError, StepFailedError, UnavailableError
from tests.inference.server.hosting.conftest import Host
from tests.inference.server.hosting.pretended import OPENING, READY, Killed, Link, Stage, answers

SETTINGS = GenerationSettings(max_new_tokens=4, prompt_logprobs=0)
ResultT = TypeVar("ResultT")


async def soon(work: Coroutine[Any, Any, ResultT]) -> ResultT:
    """What comes at all comes in time."""
    return await asyncio.wait_for(work, HANG_SECONDS)


async def tokens_of(model: HostedModel) -> list[Token]:
    async def read() -> list[Token]:
        return [token async for token in model.submit([1, 2], SETTINGS)]

    return await soon(read())


def dies(link: Link) -> None:
    """While it loads the model."""
    raise Killed


def dies_at_work(link: Link) -> None:
    """Before it has a token for anybody."""
    link.send(READY)
    link.begins()
    raise Killed


async def test_no_process_can_be_had(stage: Stage, host: Host, said: list[str]) -> None:
    def refuse() -> None:
        raise OSError(errno.EMFILE, "Too many open files")

    stage.before_start = refuse
    model = host()
    with pytest.raises(UnavailableError, match="Too many open files; end what takes the host's"):
        await soon(model.ready())
    with pytest.raises(UnavailableError):
        await tokens_of(model)
    assert len(said) == 2
    stage.before_start = lambda: None
    assert len(await tokens_of(model)) == 1


async def test_the_process_that_forks_engines_is_killed(stage: Stage, host: Host) -> None:
    """multiprocessing meets the end of a pipe; another try has another one."""
    fails = iter([True, True, False])

    def end() -> None:
        if next(fails, False):
            raise EOFError("unexpected EOF")

    stage.before_start = end
    assert len(await tokens_of(host(reattach_seconds=HANG_SECONDS))) == 1
    assert stage.num_started == 3


async def test_engines_that_die_at_their_start(stage: Stage, host: Host, said: list[str]) -> None:
    stage.parts = [dies]
    model = host(reattach_seconds=0.3)
    with pytest.raises(StepFailedError, match="The engine of m ended while it loaded the model"):
        await tokens_of(model)
    tried = stage.num_started
    assert 2 <= tried <= 31
    # It is tried no more until somebody asks again, and the log is not filled meanwhile.
    await asyncio.sleep(0.1)
    assert stage.num_started == tried
    assert len(said) == 1


async def test_a_pack_that_cannot_be_used_is_not_tried_again(stage: Stage, host: Host) -> None:
    stage.parts = [lambda link: link.send(Refused(Failed.of(PackError("Broken."))))]
    with pytest.raises(PackError, match="Broken"):
        await soon(host(reattach_seconds=HANG_SECONDS).ready())
    assert stage.num_started == 1


async def test_engines_that_die_at_work_are_bounded(stage: Stage, host: Host) -> None:
    stage.parts = [dies_at_work]
    with pytest.raises(StepFailedError, match=f"{MAX_DEATHS} engines ended"):
        await tokens_of(host())
    assert stage.num_started == MAX_DEATHS


async def test_one_that_kills_engines_takes_no_other_with_it(stage: Stage, host: Host) -> None:
    def dies_of_666(link: Link) -> None:
        link.send(READY)
        while True:
            begins = link.begins()
            if any(begin.tokens == [666] for begin in begins):
                raise Killed
            for begin in begins:
                link.token(begin, 7, last=True)

    stage.parts = [dies_of_666]
    model = host(reattach_seconds=HANG_SECONDS)
    prompts = [[1], [2], [666], [3], [4]]
    streams = [model.submit(prompt, SETTINGS) for prompt in prompts]
    ends = await soon(
        asyncio.gather(*(anext(stream) for stream in streams), return_exceptions=True)
    )
    assert [isinstance(end, Token) for end in ends] == [prompt != [666] for prompt in prompts]
    assert stage.num_started == MAX_DEATHS
    assert len(await tokens_of(model)) == 1


async def test_who_only_waits_outlives_any_number_of_engines(stage: Stage, host: Host) -> None:
    """Each of which has one token for one of them, as when it is killed right after it."""

    def has_one_token(link: Link) -> None:
        link.send(READY)
        link.token(link.begins()[0], 7, last=True)
        raise Killed

    stage.parts = [has_one_token]
    model = host(reattach_seconds=HANG_SECONDS)
    streams = [model.submit([number], SETTINGS) for number in range(3 * MAX_DEATHS)]
    tokens = await soon(asyncio.gather(*(anext(stream) for stream in streams)))
    assert {token.id for token in tokens} == {7}


async def test_an_engine_that_does_not_run_is_killed(
    stage: Stage, host: Host, said: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that is stopped (SIGSTOP); one that works for long says that it runs."""
    monkeypatch.setattr(engine_process, "PULSE_SECONDS", 0.02)

    def stands_still(link: Link) -> None:
        link.send(READY)
        link.ended.wait()

    def works_for_long(link: Link) -> None:
        for _ in range(2 * engine_process.MAX_SILENT_PULSES):
            link.ended.wait(0.02)
            link.send(Pulse())
        answers(link)

    stage.parts = [stands_still, works_for_long]
    model = host(reattach_seconds=HANG_SECONDS)
    assert len(await tokens_of(model)) == 1
    assert model.num_deaths == 1
    assert stage.processes[0].closed
    assert "did not run for" in said[0]


async def test_what_a_client_has_is_not_sent_again(stage: Stage, host: Host) -> None:
    """An engine that goes on knows nothing of how the sequence began."""

    def begins_and_dies(link: Link) -> None:
        link.send(READY)
        for begin in link.begins():
            link.token(begin, 5)
        raise Killed

    stage.parts = [begins_and_dies, answers]
    first, last = await tokens_of(host())
    assert (first.id, first.opening, last.id, last.opening) == (5, OPENING, 7, None)
    (again,) = stage.links[1].begun
    assert again.origin.generated == (5,)
    assert again.settings.prompt_logprobs is None


async def test_a_model_that_is_closed_answers(stage: Stage, host: Host) -> None:
    """Whoever found it before it was unloaded."""
    loading = threading.Event()
    stage.parts = [lambda link: loading.set() or link.ended.wait(HANG_SECONDS)]  # type: ignore[func-returns-value]
    model = host()
    waiting = asyncio.create_task(model.ready())
    await asyncio.to_thread(loading.wait, HANG_SECONDS)
    closing = asyncio.create_task(model.close(NotFoundError("There is no model 'm' any more.")))
    with pytest.raises(NotFoundError, match="any more"):
        await soon(model.ready())
    with pytest.raises(NotFoundError, match="any more"):
        model.submit([1], SETTINGS)
    stage.links[0].ended.set()
    await soon(closing)
    with pytest.raises(NotFoundError, match="any more"):
        await soon(waiting)


async def test_closed_while_its_engine_is_forked(stage: Stage, host: Host) -> None:
    """Its process is waited for, and ended."""
    forking, forked = threading.Event(), threading.Event()

    def fork() -> None:
        forking.set()
        forked.wait(HANG_SECONDS)

    stage.before_start = fork
    stage.parts = [lambda link: link.begins() and None]
    model = host()
    waiting = asyncio.create_task(model.ready())
    await asyncio.to_thread(forking.wait, HANG_SECONDS)
    closing = asyncio.create_task(model.close())
    await asyncio.sleep(0.05)
    forked.set()
    await soon(closing)
    assert (await asyncio.gather(waiting, return_exceptions=True))[0] is not None
    assert stage.processes[0].exitcode is not None


async def test_a_mistake_of_ours_is_told(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: object) -> EngineProcess:
        raise KeyError("a bug")

    told: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _, context: told.append(context))
    monkeypatch.setattr(EngineProcess, "start", broken)
    model = host()
    with pytest.raises(StepFailedError, match="computes m no more"):
        await tokens_of(model)
    with pytest.raises(StepFailedError, match="computes m no more"):
        model.submit([1], SETTINGS)
    assert isinstance(told[0]["exception"], KeyError)
