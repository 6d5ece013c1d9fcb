"""Probes read what they say they read; how fast a machine is, no test can tell."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from expertd_inference.advice import probes
from expertd_inference.kernels.cpu.library import native_library
from expertd_testing.fake_device import FakeDevice, FakeSpeed
from expertd_testing.handmade import make_pack
from expertstore.errors import InvalidInputError, PackError
from expertstore.native import Loaded

SMALL = 1 << 20
native = pytest.mark.skipif(native_library().library is None, reason="no native kernels here")


def rate_of(path: Path, said: list[str], **how: Any) -> float:
    with probes.StorageProbe(path, piece_bytes=64 << 10, say=said.append, **how) as probe:
        return probe.rate(0.01, depth=3)


@native
@pytest.mark.parametrize("threads", [1, 3])
def test_memory_is_read_whole(threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[tuple[int, int, int]] = []
    plain = probes.read_memory

    def noted(address: int, num_bytes: int, threads: int, *form: int) -> None:
        read.append((address, num_bytes, threads))
        plain(address, num_bytes, threads, *form)

    monkeypatch.setattr(probes, "read_memory", noted)
    said: list[str] = []
    with probes.MemoryProbe(threads, say=said.append, num_bytes=SMALL) as probe:
        read.clear()
        rates = [probe.rate(), probe.rate()]
    assert min(rates) > 0
    assert {num for _, num, _ in read} == {SMALL // 4}
    assert {used for _, _, used in read} == {threads}
    starts = sorted({address for address, _, _ in read})
    assert np.diff(starts).tolist() == [SMALL // 4] * 3, "each quarter, one after the other"
    assert not said


def test_without_native_kernels_numpy_reads_and_that_is_said(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(probes, "native_library", lambda: Loaded(None, "none was built"))
    monkeypatch.setattr(probes, "read_memory", None)
    said: list[str] = []
    with probes.MemoryProbe(2, say=said.append, num_bytes=SMALL) as probe:
        assert probe.rate() > 0
        probe.close()
    assert len(said) == 1
    assert "none was built" in said[0]


def test_a_file_is_read_and_stays(tmp_path: Path) -> None:
    file = tmp_path / "data"
    file.write_bytes(os.urandom(SMALL + 5))
    assert rate_of(file, []) > 0
    assert file.exists()


def test_a_pack_s_own_records_are_read(tmp_path: Path) -> None:
    pack = make_pack(tmp_path / "pack", layers=2, experts=8, record_bytes=64 << 10)
    before = sorted(pack.iterdir())
    with probes.StorageProbe(pack, piece_bytes=64 << 10, say=lambda _: None) as probe:
        assert "experts" in repr(probe)
        assert probe.rate(0.01) > 0
        assert sorted(pack.iterdir()) == before, "nothing is written beside a pack"


def test_a_file_that_was_made_is_removed(tmp_path: Path) -> None:
    said: list[str] = []
    with probes.StorageProbe(tmp_path, file_bytes=SMALL, say=said.append) as probe:
        assert len(list(tmp_path.iterdir())) == 1
        assert probe.rate(0.01) > 0
    probe.close()
    assert not list(tmp_path.iterdir())


def test_a_page_cache_is_not_taken_for_a_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probes.RecordFile, "_open_direct", lambda _: False)
    said: list[str] = []
    rate_of(tmp_path, said, file_bytes=SMALL)
    assert len(said) == 1
    assert "page cache" in said[0]


def test_what_cannot_be_measured_is_refused(tmp_path: Path) -> None:
    (tmp_path / "small").write_bytes(b"x" * 100)
    with pytest.raises(InvalidInputError, match="100 B, too little"):
        rate_of(tmp_path / "small", [])
    with pytest.raises(PackError, match="cannot be read"):
        rate_of(tmp_path / "missing", [])


@pytest.mark.skipif(os.geteuid() == 0, reason="root writes everywhere")
def test_a_directory_that_cannot_be_written_to(tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    with pytest.raises(InvalidInputError, match="cannot be written to"):
        rate_of(tmp_path, [])


def test_a_full_disk_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InvalidInputError, match="No space left on device"):
        rate_of(tmp_path, [], file_bytes=SMALL)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("registers", [True, False])
def test_the_link_s_rate_is_the_copies(registers: bool) -> None:
    speed = FakeSpeed(
        link_bytes_per_second=40e9, staged_bytes_per_second=10e9, copy_seconds=0, call_seconds=0
    )
    device = FakeDevice(memory_bytes=SMALL, speed=speed, registers=registers)
    rate = probes.link_rate(device, 64 << 10)
    # All of the fake's time is the copies'; of staged ones the last still has to cross the link.
    assert rate == pytest.approx(40e9 if registers else 10e9, rel=0.05)
    assert all(memory.closed for memory in device.memory)


def test_a_gpu_s_memory() -> None:
    assert probes.gpu_memory(FakeDevice(memory_bytes=SMALL)) == SMALL


def test_without_a_gpu_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probes.torch.cuda, "is_available", lambda: False)
    assert probes.link_rate() is None
    assert probes.gpu_memory() is None
    assert probes.gpu_memory_rate() is None
