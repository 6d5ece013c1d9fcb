"""Messages between the front and an engine, however the socket cuts them."""

import asyncio
import socket

import msgspec

from expertd_inference.server.hosting.link import BlockingLink, Frames, LoopLink, _framed
from expertd_inference.server.hosting.messages import Failure
from expertd_testing.patience import HANG_SECONDS
from expertstore.errors import (
    BusyError,
    ExpertdError,
    PromptTooLongError,
    StepFailedError,
)


class Word(msgspec.Struct, tag=True):
    text: str


class Number(msgspec.Struct, tag=True):
    value: int


SAID = [Word(""), Number(1 << 40), Word("é" * 100), Number(0)]
BYTES = b"".join(map(_framed, SAID))


def test_messages_are_whole_wherever_they_are_cut() -> None:
    for size in range(1, len(BYTES) + 1):
        frames: Frames[Word | Number] = Frames(Word | Number)
        found = []
        for begin in range(0, len(BYTES), size):
            found += frames.feed(BYTES[begin : begin + size])
        assert found == SAID
        assert frames.feed(b"") == []


def test_the_engine_s_end() -> None:
    ours, theirs = socket.socketpair()
    with theirs:
        link: BlockingLink[Word | Number] = BlockingLink(theirs, Word | Number)
        link.send(SAID[0])
        assert ours.recv(100) == _framed(SAID[0])
        ours.sendall(BYTES[:7])
        assert link.receive() == []
        ours.sendall(BYTES[7:])
        assert link.receive() == SAID
        link.send(SAID[0])
        ours.close()  # with something unread: the other end is reset
        assert link.receive() is None


async def test_the_front_s_end() -> None:
    ours, theirs = socket.socketpair()
    said: asyncio.Queue[Word | Number | None] = asyncio.Queue()
    link: LoopLink[Word | Number] = LoopLink(
        Word | Number, said.put_nowait, lambda: said.put_nowait(None)
    )
    link.close()  # harmless before there is a connection
    ours.setblocking(False)
    with theirs:
        await asyncio.get_running_loop().create_connection(lambda: link, sock=ours)
        theirs.sendall(BYTES)
        async with asyncio.timeout(HANG_SECONDS):
            assert [await said.get() for _ in SAID] == SAID
        link.send(SAID[2])
        link.close()
        link.send(SAID[0])  # nobody hears it any more
        async with asyncio.timeout(HANG_SECONDS):
            assert await said.get() is None
        assert theirs.recv(1 << 16) == _framed(SAID[2])
        assert theirs.recv(1) == b""


def test_failures_are_the_same_in_the_other_process() -> None:
    def passed_on(error: Exception) -> ExpertdError:
        sent = msgspec.json.encode(Failure.of(error))
        return msgspec.json.decode(sent, type=Failure).error()

    busy = passed_on(BusyError("Why."))
    assert (type(busy), str(busy)) == (BusyError, "Why.")
    long = passed_on(PromptTooLongError("Why.", num_tokens=3, limit=2))
    assert isinstance(long, PromptTooLongError)
    assert (str(long), long.num_tokens, long.limit) == ("Why.", 3, 2)
    bug = passed_on(ZeroDivisionError("Why."))
    assert (type(bug), str(bug)) == (StepFailedError, "Why.")
    unknown = Failure("PromptTooLongError", "Why.").error()
    assert (type(unknown), str(unknown)) == (StepFailedError, "Why.")
