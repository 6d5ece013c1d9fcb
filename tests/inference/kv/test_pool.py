"""Blocks and slots are counted as a naive model counts them."""

from hypothesis import given, settings
from hypothesis import strategies as st

from expertd_inference.kv.pool import BLOCK_TOKENS, BlockPool, num_blocks_of
from expertd_inference.kv.state import StateSlots


@settings(max_examples=200, deadline=None)
@given(num_blocks=st.integers(1, 8), data=st.data())
def test_blocks_are_counted_as_naively(num_blocks: int, data: st.DataObject) -> None:
    pool = BlockPool(num_blocks)
    tables: list[list[int]] = []
    names: dict[int, bytes] = {}  # of blocks that are used or kept
    kept: list[int] = []  # without users, the next to go first
    for step in range(data.draw(st.integers(0, 40))):
        used = {block for table in tables for block in table}
        act = data.draw(st.sampled_from(["allocate", "share", "find", "release", "keep"]))
        if act == "allocate":
            wanted = data.draw(st.integers(0, num_blocks))
            got = pool.allocate(wanted)
            if wanted > num_blocks - len(used):
                assert got is None
                continue
            assert got is not None
            assert len(set(got)) == wanted
            assert not used & set(got)
            num_blank = num_blocks - len(used) - len(kept)
            gone = kept[: max(0, wanted - num_blank)]
            assert set(got) & set(kept) == set(gone)
            kept = kept[len(gone) :]
            for block in gone:
                assert pool.find(names.pop(block)) is None
            tables.append(got)
        elif act == "share" and tables:
            table = data.draw(st.sampled_from(tables))
            pool.retain(table)
            tables.append(list(table))
        elif act == "find" and kept:
            block = data.draw(st.sampled_from(kept))
            assert pool.find(names[block]) == block
            pool.retain([block])
            kept.remove(block)
            tables.append([block])
        elif act == "release" and tables:
            table = tables.pop(data.draw(st.integers(0, len(tables) - 1)))
            pool.release(table)
            still = {block for other in tables for block in other}
            # The end of a table goes before its beginning.
            kept += [block for block in reversed(table) if block in names and block not in still]
        elif act == "keep" and (unnamed := sorted(used - names.keys())):
            block = data.draw(st.sampled_from(unnamed))
            names[block] = b"%d" % step
            pool.keep(block, names[block])
        counts = [sum(table.count(block) for table in tables) for block in range(num_blocks)]
        assert [pool.num_users(block) for block in range(num_blocks)] == counts
        assert pool.num_free == counts.count(0)
        assert pool.num_kept == len(kept)
        assert all(pool.find(name) == block for block, name in names.items())


def test_how_many_blocks_tokens_take() -> None:
    assert [num_blocks_of(n) for n in (0, 1, BLOCK_TOKENS, BLOCK_TOKENS + 1)] == [0, 1, 1, 2]


@settings(max_examples=50, deadline=None)
@given(num_slots=st.integers(1, 5), takes=st.lists(st.booleans(), max_size=30))
def test_slots_are_counted_as_naively(num_slots: int, takes: list[bool]) -> None:
    slots = StateSlots(num_slots)
    taken: list[int] = []
    for take in takes:
        if take and len(taken) < num_slots:
            slot = slots.take()
            assert 0 <= slot < num_slots
            assert slot not in taken
            taken.append(slot)
        elif taken:
            slots.give_back(taken.pop(0))
        assert slots.num_free == num_slots - len(taken)
