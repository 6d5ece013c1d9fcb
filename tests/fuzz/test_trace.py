"""Routing traces: whatever is in the file, it is read or refused in a sentence."""

import tracemalloc
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from expertstore.errors import TraceError
from expertstore.trace import TraceReader
from tests.fuzz.budget import bounded

SOUND = """\
# layers: 2
# experts_per_layer: 4
# experts_per_token: 2
phase,step,layer,experts
prefill,0,0,0 1 2
prefill,0,1,3
decode,1,0,1 2
decode,1,1,0 3
"""
PIECES = [
    *SOUND.splitlines(keepends=True),
    "# session: 3\n",
    "# layer_ids: 1 7\n",
    "# layers: 99999999999999999999\n",
    "decode,99999999999999999999,0,1\n",
    "decode,0,-1,1\n",
    "decode,0,0," + "1 " * 5000 + "\n",
    "\0\n",
    "\ufeff",
    '"decode\n',
    "\r",
]
MAX_BYTES = 32 << 20


@st.composite
def bent(draw: st.DrawFn) -> bytes:
    data = bytearray("".join(draw(st.lists(st.sampled_from(PIECES), max_size=15))).encode())
    if draw(st.booleans()):
        data = bytearray(SOUND.encode()) + data
    for _ in range(draw(st.integers(0, 3)) if data else 0):
        data[draw(st.integers(0, len(data) - 1))] = draw(st.integers(0, 255))
    return bytes(data)


def test_the_sound_one_is_read(tmp_path: Path) -> None:
    """Else what is made of it would never come far."""
    assert len(rows(tmp_path / "t.csv", SOUND.encode()) or []) == 4


@bounded(400)
@given(data=st.one_of(bent(), st.binary(max_size=500)))
def test_whatever_is_in_the_file(data: bytes, tmp_path_factory: pytest.TempPathFactory) -> None:
    tracemalloc.start()
    try:
        rows(tmp_path_factory.getbasetemp() / "trace.csv", data)
        assert tracemalloc.get_traced_memory()[1] < MAX_BYTES
    finally:
        tracemalloc.stop()


def rows(path: Path, data: bytes) -> list[object] | None:
    path.write_bytes(data)
    try:
        with TraceReader(path) as reader:
            return list(reader)
    except TraceError as error:
        message = str(error)
    assert "\n" not in message
    assert len(message) < len(str(path)) + 400
    return None
