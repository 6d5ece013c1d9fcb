"""Steps are encoded ahead, handed out in order, and their bytes stay while they are looked at."""

import threading
from contextlib import closing

import pytest

from expertd.packing.pipeline import NUM_AHEAD, encode_ahead
from expertd.packing.scratch import Scratch

PATIENCE = 10.0


def filled(step: int, scratch: Scratch) -> memoryview:
    return scratch.take(1000).fill_(step).numpy().data


def test_in_order_and_whole() -> None:
    steps = [(10 * step, step) for step in range(20)]
    seen = []
    for index, step, data in encode_ahead(filled, steps):
        seen.append((index, step))
        assert bytes(data) == bytes([step]) * 1000
    assert seen == steps


def test_the_next_ones_are_encoded_while_one_is_looked_at() -> None:
    begun = [threading.Event() for _ in range(10)]

    def encode(step: int, scratch: Scratch) -> memoryview:
        begun[step].set()
        return filled(step, scratch)

    with closing(encode_ahead(encode, enumerate(range(10)))) as encoded:
        _, _, data = next(encoded)
        assert all(event.wait(PATIENCE) for event in begun[: 1 + NUM_AHEAD])
        assert bytes(data) == bytes(1000)
        # No memory is left for another one.
        assert not begun[1 + NUM_AHEAD].is_set()


def test_an_error_comes_in_its_turn() -> None:
    def encode(step: int, scratch: Scratch) -> memoryview:
        if step == 2:
            raise ValueError("damaged")
        return filled(step, scratch)

    encoded = encode_ahead(encode, enumerate(range(10)))
    assert [next(encoded)[0], next(encoded)[0]] == [0, 1]
    with pytest.raises(ValueError, match="damaged"):
        next(encoded)


def test_closing_waits_for_what_has_begun_and_begins_no_more() -> None:
    running = threading.Semaphore(0)
    ended = []

    def encode(step: int, scratch: Scratch) -> memoryview:
        if step:
            running.release()
        ended.append(step)
        return filled(step, scratch)

    encoded = encode_ahead(encode, enumerate(range(10)))
    next(encoded)
    assert running.acquire(timeout=PATIENCE)
    encoded.close()
    number = len(ended)
    assert number <= 1 + NUM_AHEAD
    assert not [thread for thread in threading.enumerate() if "expertd-encoder" in thread.name]
    assert len(ended) == number


def test_nothing_to_do() -> None:
    assert not list(encode_ahead(filled, []))
