"""A directory's description: read back as it was written, or refused."""

from collections.abc import Iterator

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertd.memory.description import Description, Origin, new_directory, read_description
from expertd.memory.memfd import SharedMemory
from expertd.settings.limits import ModelLimits
from expertstore.shared.directory import PAGE_BYTES, Directory, directory_bytes

NUM_ENTRIES = 24
DESCRIPTION = Description(
    name="m",
    pack="/packs/m",
    fingerprint="0123456789abcdef",
    arena=7,
    origin=Origin.CONFIG,
    limits=ModelLimits(4096, 1 << 40, ("0:*", "5:3")),
)


@pytest.fixture
def memory() -> Iterator[SharedMemory]:
    memory = new_directory(NUM_ENTRIES, DESCRIPTION)
    yield memory
    memory.close()


@given(
    st.integers(1, 2000),
    st.text(min_size=1, max_size=128),
    st.text(max_size=5000),
    st.integers(0, 2**64 - 1),
    st.sampled_from(Origin),
)
def test_round_trip(num_entries: int, name: str, pack: str, arena: int, origin: Origin) -> None:
    written = Description(name=name, pack=pack, fingerprint="f", arena=arena, origin=origin)
    memory = new_directory(num_entries, written)
    directory = Directory(memory.view.cast("Q"))
    assert directory.num_entries == num_entries
    assert not any(directory.word(entry) for entry in range(num_entries))
    # Words do not reach into it.
    for entry in range(num_entries):
        directory.publish(entry, 2**64 - 1)
    assert read_description(memory) == written
    del directory
    memory.close()


def test_limits_come_back(memory: SharedMemory) -> None:
    assert read_description(memory).limits == DESCRIPTION.limits


def test_limits_that_make_no_sense() -> None:
    limits = ModelLimits()
    object.__setattr__(limits, "min_bytes", -1)  # as no daemon of ours writes it
    memory = new_directory(NUM_ENTRIES, msgspec.structs.replace(DESCRIPTION, limits=limits))
    with pytest.raises(ValueError, match="makes no sense"):
        read_description(memory)
    memory.close()


@given(st.data())
def test_a_damaged_byte_is_noticed(data: st.DataObject) -> None:
    memory = new_directory(NUM_ENTRIES, DESCRIPTION)
    start = directory_bytes(NUM_ENTRIES)
    end = start + 16 + len(msgspec.json.encode(DESCRIPTION))
    offset = data.draw(
        st.one_of(st.integers(0, 15), st.integers(24, 31), st.integers(start, end - 1))
    )
    memory.view[offset] ^= data.draw(st.integers(1, 255))
    try:
        found = read_description(memory)
    except ValueError:
        pass
    else:  # another number of entries that ends on the same page: its claim() finds it
        assert 24 <= offset < 32
        assert found == DESCRIPTION
        assert Directory(memory.view.cast("Q")).num_entries != NUM_ENTRIES
    memory.close()


def test_a_file_cut_short_is_refused(memory: SharedMemory) -> None:
    short = SharedMemory("short", directory_bytes(NUM_ENTRIES), 0o600)
    short.view[:] = memory.view[: short.num_bytes]
    with pytest.raises(ValueError, match="more entries than room"):
        read_description(short)
    short.close()


def test_an_empty_file_is_refused() -> None:
    empty = SharedMemory("empty", PAGE_BYTES, 0o600)
    with pytest.raises(ValueError, match="not a directory"):
        read_description(empty)
    empty.close()
    odd = SharedMemory("odd", 100, 0o600)
    with pytest.raises(ValueError, match="whole pages"):
        read_description(odd)
    odd.close()
