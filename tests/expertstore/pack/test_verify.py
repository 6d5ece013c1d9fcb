"""Whatever byte of a pack is damaged, verify says so, and names the record."""

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from expertd_testing.handmade import PAGE
from expertstore.errors import PackError
from expertstore.pack.verify import Damage, verify
from tests.expertstore.pack.conftest import EXPERTS, LAYERS, RECORD_BYTES

FILE = "experts-00000.safetensors"
EXPERT_BYTES = LAYERS * EXPERTS * RECORD_BYTES


def flip(path: Path, offset: int) -> None:
    data = bytearray(path.read_bytes())
    data[offset] ^= 0x10
    path.write_bytes(data)


def test_a_whole_pack(pack: Path) -> None:
    seen: list[tuple[int, int]] = []
    result = verify(pack, lambda done, total: seen.append((done, total)))
    assert result.damages == ()
    assert result.num_records == LAYERS * EXPERTS
    assert seen[0] == (0, EXPERT_BYTES)
    assert seen[-1] == (EXPERT_BYTES, EXPERT_BYTES)
    assert seen == sorted(seen)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=30)
@given(offset=st.integers(0, EXPERT_BYTES - 1))
def test_any_flipped_byte_of_a_record_is_found(pack: Path, offset: int) -> None:
    flip(pack / FILE, PAGE + offset)
    try:
        layer, expert = divmod(offset // RECORD_BYTES, EXPERTS)
        assert verify(pack).damages == (Damage(FILE, "its checksum is wrong", layer, expert),)
    finally:
        flip(pack / FILE, PAGE + offset)


def test_all_damaged_records_are_listed(pack: Path) -> None:
    for index in (0, 3, 6):
        flip(pack / FILE, PAGE + index * RECORD_BYTES)
    found = [(damage.layer, damage.expert) for damage in verify(pack).damages]
    assert found == [(0, 0), (0, 3), (1, 2)]


def test_a_truncated_file(pack: Path) -> None:
    with (pack / FILE).open("r+b") as file:
        file.truncate(PAGE + EXPERT_BYTES - 1)
    damages = verify(pack).damages
    assert damages[0].file == FILE
    assert "of" in damages[0].reason
    assert damages[1] == Damage(FILE, "the file ends before it", LAYERS - 1, EXPERTS - 1)


def test_a_missing_file(pack: Path) -> None:
    (pack / FILE).unlink()
    assert len(verify(pack).damages) == 1 + LAYERS * EXPERTS


def test_a_damaged_header(pack: Path) -> None:
    data = (pack / FILE).read_bytes()
    assert verify(pack).damages == ()
    (pack / FILE).write_bytes(data.replace(b'"layers.1.experts.2"', b'"layers.1.experts.9"', 1))
    assert [(d.layer, d.expert) for d in verify(pack).damages] == [(1, 2)]
    (pack / FILE).write_bytes(b"\0" * PAGE + data[PAGE:])
    assert "header cannot be read" in verify(pack).damages[0].reason


@pytest.mark.parametrize(
    ("trunk", "reason"),
    [(b"!", "its checksum is wrong"), (b"", "it has 0 of 1 bytes"), (None, "No such file")],
)
def test_a_damaged_trunk(pack: Path, trunk: bytes | None, reason: str) -> None:
    tree = json.loads((pack / "pack.json").read_bytes())
    tree["trunk"]["num_bytes"] = 1
    (pack / "pack.json").write_text(json.dumps(tree))
    path = pack / "trunk.safetensors"
    path.unlink()
    if trunk is not None:
        path.write_bytes(trunk)
    (damage,) = verify(pack).damages
    assert damage.file == "trunk.safetensors"
    assert reason in damage.reason


def test_not_a_pack(tmp_path: Path) -> None:
    with pytest.raises(PackError):
        verify(tmp_path)
