"""Tokens on their way to a reader, in a thread or in an event loop."""

import asyncio
import itertools
import sys
import threading
from types import FrameType
from typing import Any

import pytest

from expertd_inference.engine.channel import Channel
from expertd_testing.patience import HANG_SECONDS
from expertstore.errors import PreconditionError, UnavailableError


def test_in_order_and_to_the_end() -> None:
    channel: Channel[int] = Channel()
    channel.send([1, 2])
    channel.send([3])
    assert channel.num_waiting == 3
    channel.end()
    channel.send([4])
    channel.end(UnavailableError("too late"))
    assert [channel.receive() for _ in range(5)] == [1, 2, 3, None, None]


def test_what_came_before_an_error_is_received() -> None:
    channel: Channel[int] = Channel()
    channel.send([1])
    channel.end(UnavailableError("gone"))
    assert channel.receive() == 1
    for _ in range(2):
        with pytest.raises(UnavailableError, match="gone"):
            channel.receive()


def test_what_waits_can_be_dropped() -> None:
    channel: Channel[int] = Channel()
    channel.send([1])
    channel.end(drop=True)
    assert channel.receive() is None


def test_a_reader_in_another_thread() -> None:
    channel: Channel[int] = Channel()
    received: list[int | None] = []

    def read() -> None:
        while received[-1:] != [None]:
            received.append(channel.receive())

    thread = threading.Thread(target=read)
    thread.start()
    for number in range(100):
        channel.send([number])
    channel.end()
    thread.join(HANG_SECONDS)
    assert received == [*range(100), None]


async def test_a_reader_in_an_event_loop() -> None:
    channel: Channel[int] = Channel()

    def send() -> None:
        for number in range(100):
            channel.send([number])
        channel.end()

    thread = threading.Thread(target=send)
    reader = asyncio.create_task(received_from(channel))
    await asyncio.sleep(0)  # it waits
    thread.start()
    assert await asyncio.wait_for(reader, HANG_SECONDS) == [*range(100)]
    thread.join()


async def test_a_reader_waits_as_often_as_it_must() -> None:
    await wait_thrice(Channel())


async def wait_thrice(channel: Channel[int]) -> None:
    for number in range(3):
        reader = asyncio.create_task(channel.receive_async())
        await asyncio.sleep(0)  # it waits
        channel.send([number])
        assert await asyncio.wait_for(reader, HANG_SECONDS) == number


async def received_from(channel: Channel[int]) -> list[int]:
    items = []
    while (item := await channel.receive_async()) is not None:
        items.append(item)
    return items


async def test_a_reader_that_gives_up_can_read_again() -> None:
    channel: Channel[int] = Channel()
    with pytest.raises(TimeoutError):
        await asyncio.wait_for(channel.receive_async(), 0.001)
    channel.send([1])
    channel.end(UnavailableError("gone"))
    assert await channel.receive_async() == 1
    with pytest.raises(UnavailableError):
        await channel.receive_async()


async def test_two_readers_are_one_too_many() -> None:
    channel: Channel[int] = Channel()
    first = asyncio.create_task(channel.receive_async())
    await asyncio.sleep(0)
    with pytest.raises(PreconditionError, match="Two tasks read one stream"):
        await channel.receive_async()
    channel.send([1])
    assert await asyncio.wait_for(first, HANG_SECONDS) == 1


def test_an_event_loop_that_ended_is_no_trouble() -> None:
    channel: Channel[int] = Channel()
    loop = asyncio.new_event_loop()
    waiting = loop.create_task(channel.receive_async())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    channel.send([1])
    assert channel.receive() == 1
    # Another loop's reader may wait.
    asyncio.run(wait_thrice(channel))
    waiting._log_destroy_pending = False  # type: ignore[attr-defined] # it never ends


def interrupted_at(place: int, channel: Channel[int]) -> bool:
    """Receives, with KeyboardInterrupt at so many instructions; False if it took fewer."""
    num = 0

    def trace(frame: FrameType, event: str, _: Any) -> Any:
        nonlocal num
        frame.f_trace_opcodes = True
        num += event == "opcode"
        if num > place:
            sys.settrace(None)
            raise KeyboardInterrupt
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        channel.receive()
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(before)
    return False


def test_an_interrupted_reader_keeps_no_lock() -> None:
    for place in itertools.count():
        channel: Channel[int] = Channel()
        channel.send([1])
        if not interrupted_at(place, channel):
            break
        sender = threading.Thread(target=channel.send, args=([2],), daemon=True)
        sender.start()
        sender.join(HANG_SECONDS)
        assert not sender.is_alive(), f"the engine waits for a reader interrupted at {place}"
    assert place > 5
