"""Rows out of the arena, and what happens when they leave it while they are copied."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from expertd.tables.row_slots import RowSlots
from expertd_client.model import TableInfo
from expertd_client.table_rows import TableRows
from expertstore.errors import NotFoundError, SessionLostError
from expertstore.shared.row_cache import WAYS, RowPlaces

PLACES = RowPlaces(4096, 1, 24)
VALUES = np.random.default_rng(0).integers(0, 256, (100, 24), np.uint8)


class FakeSession:
    """A session whose daemon has the cache in this process."""

    def __init__(self) -> None:
        arena = memoryview(bytearray(4096 + PLACES.num_bytes))
        self.arena_view: memoryview | None = arena.toreadonly()
        self.slots = RowSlots(arena, PLACES)
        info = TableInfo("t.weight", len(VALUES), 24, 10, PLACES)
        self.model = SimpleNamespace(name="m", tables=(info,))
        self.fetched: list[list[int]] = []
        self.hinted: list[list[int]] = []
        self.used: list[int] = []
        self.is_revoked = False

    def fetch_rows(self, table: int, rows: bytes, used: bytes = b"") -> bytes:
        self.fetched.append(np.frombuffer(rows, np.int64).tolist())
        self.used += np.frombuffer(used, np.int64).tolist()
        return VALUES[self.fetched[-1]].tobytes()

    def prefetch_rows(self, table: int, rows: bytes, used: bytes = b"") -> None:
        self.hinted.append(np.frombuffer(rows, np.int64).tolist())

    def tell_used(self, table: int, used: bytes) -> None:
        self.used += np.frombuffer(used, np.int64).tolist()

    def check_revoked(self) -> None:
        if self.is_revoked:
            raise SessionLostError("The daemon ended this session.")

    def put(self, *rows: int) -> None:
        self.slots.put(np.array(rows), VALUES[[*rows]])


@pytest.fixture
def session() -> FakeSession:
    return FakeSession()


def rows(*numbers: int) -> NDArray[np.int64]:
    return np.array(numbers, np.int64)


def open_rows(session: Any) -> TableRows:
    return TableRows(session, "t.weight")


def test_only_what_is_missing_is_fetched(session: FakeSession) -> None:
    table = open_rows(session)
    session.put(3, 4, 5)
    wanted = rows(5, 7, 3, 7, 5)
    assert (table.read(wanted) == VALUES[wanted]).all()
    assert session.fetched == [[7]]
    assert (table.hits, table.misses) == (2, 1)
    assert session.used == [3, 5]
    assert (table.read(rows(4)) == VALUES[4]).all()
    assert len(session.fetched) == 1, "a hit costs no call"
    table.tell()
    assert session.used == [3, 5, 4]


def test_more_than_one_call_can_name(session: FakeSession) -> None:
    wanted = np.arange(25)
    assert (open_rows(session).read(wanted) == VALUES[wanted]).all()
    assert [len(each) for each in session.fetched] == [10, 10, 5]


def test_a_row_that_leaves_while_it_is_copied(
    session: FakeSession, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What was copied may be another row's: it is thrown away, and fetched."""
    table = open_rows(session)
    session.put(3, 4)
    look_up, looks = table._look_up, []

    def slowly(view: memoryview, wanted: NDArray[np.int64]) -> Any:
        looks.append(wanted)
        if len(looks) == 2:  # the copy is made
            session.put(*range(20, 20 + WAYS))
            session.slots.touch(np.arange(21, 20 + WAYS))
            session.put(3)  # it comes back, to another slot or its own
        return look_up(view, wanted)

    monkeypatch.setattr(table, "_look_up", slowly)
    assert (table.read(rows(3, 4)) == VALUES[[3, 4]]).all()
    assert session.fetched == [[3, 4]]
    assert table.hits == 0


def test_hints_name_what_is_absent(session: FakeSession) -> None:
    session.put(3)
    open_rows(session).expect(rows(3, 9, 9, 2))
    assert session.hinted == [[2, 9]]


def test_without_shared_memory_all_rows_are_fetched(session: FakeSession) -> None:
    session.arena_view = None
    table = open_rows(session)
    assert (table.read(rows(1, 2)) == VALUES[[1, 2]]).all()
    assert (table.read(rows(1, 2)) == VALUES[[1, 2]]).all()
    assert session.fetched == [[1, 2], [1, 2]]
    table.expect(rows(5))
    assert not session.hinted


def test_a_session_that_is_over(session: FakeSession) -> None:
    table = open_rows(session)
    session.put(3)
    session.is_revoked = True
    with pytest.raises(SessionLostError):
        table.read(rows(3))
    session.arena_view = memoryview(b"")
    with pytest.raises(SessionLostError):
        table.read(rows(3))


def test_a_table_that_the_model_lacks(session: Any) -> None:
    with pytest.raises(NotFoundError, match=r"m has no table other\.weight"):
        TableRows(session, "other.weight")
