"""What is counted as it changes is what counting it all would give."""

from collections import Counter

from hypothesis import given
from hypothesis import strategies as st

from expertd.hosting.tally import Tally

SIZES = [3, 5, 7, 11]
records = st.lists(st.integers(0, 3), max_size=6)


@given(st.lists(records, max_size=8), st.data())
def test_it_is_what_counting_gives(added: list[list[int]], data: st.DataObject) -> None:
    tally, kept = Tally(SIZES.__getitem__), list[list[int]]()
    for some in added:
        tally.add(some)
        kept.append(some)
        if data.draw(st.booleans()):
            tally.remove(kept.pop(data.draw(st.integers(0, len(kept) - 1))))
        counts = Counter(record for each in kept for record in each)
        assert {record: tally.count(record) for record in range(4)} == {
            record: counts[record] for record in range(4)
        }
        assert {*tally} == {*counts}
        assert len(tally) == len(counts)
        assert tally.num_bytes == sum(SIZES[record] for record in counts)
