"""Blocks of which another text may have the first tokens."""

from expertd_inference.engine.beginnings import MIN_SHARED, MOST_LOOKED_AT, Beginnings
from expertd_inference.kv.pool import BlockPool

TEXT = list(range(64))


def kept(pool: BlockPool, beginnings: Beginnings, name: bytes, tokens: list[int]) -> int:
    (block,) = pool.allocate(1) or ()
    pool.keep(block, name)
    beginnings.note(block, name, b"before", tokens)
    pool.release([block])
    return block


def test_the_block_with_most_of_the_tokens_is_found() -> None:
    pool = BlockPool(4)
    beginnings = Beginnings(pool)
    some = kept(pool, beginnings, b"some", [*TEXT[:30], 99])
    most = kept(pool, beginnings, b"most", [*TEXT[:40], 99])
    assert beginnings.find(b"before", TEXT) == (most, 40)
    assert beginnings.find(b"before", [*TEXT[:20], 7]) == (most, 20)  # the one that came last
    assert beginnings.find(b"before", TEXT[:MIN_SHARED]) == (most, MIN_SHARED)
    assert beginnings.find(b"before", TEXT[: MIN_SHARED - 1]) is None
    assert beginnings.find(b"another", TEXT) is None
    assert some != most


def test_a_block_whose_room_was_needed_is_forgotten() -> None:
    pool = BlockPool(2)
    beginnings = Beginnings(pool)
    first = kept(pool, beginnings, b"first", TEXT)
    second = kept(pool, beginnings, b"second", TEXT[:20])
    assert pool.allocate(1) == [first]
    assert beginnings.find(b"before", TEXT) == (second, 20)
    pool.release([first])
    # It has something else now, after something else.
    again = kept(pool, beginnings, b"again", TEXT[:9])
    assert again == first
    assert beginnings.find(b"before", TEXT) == (second, 20)
    assert pool.allocate(2) is not None
    assert beginnings.find(b"before", TEXT) is None
    assert not beginnings._had
    assert not beginnings._after


def test_of_many_blocks_those_that_came_last_are_looked_at() -> None:
    pool = BlockPool(MOST_LOOKED_AT + 1)
    beginnings = Beginnings(pool)
    kept(pool, beginnings, b"best", TEXT)
    for number in range(MOST_LOOKED_AT):
        kept(pool, beginnings, b"%d" % number, TEXT[: MIN_SHARED + number])
    found = beginnings.find(b"before", TEXT)
    assert found is not None
    assert found[1] == MIN_SHARED + MOST_LOOKED_AT - 1
