"""Registering mapped memory, against a runtime that keeps the driver's rules on real mappings."""

import mmap
import os
from pathlib import Path

import pytest

from expertd.errors import DeviceLostError
from expertd_client import Client
from expertd_client.arena_mapping import address_of
from expertd_inference.device.registration import (
    RefusedError,
    Registration,
    explain_refusal,
    is_writable,
)
from expertd_testing.fake_cudart import INVALID_VALUE, LOST, FakeCudart
from tests.daemon import serving
from tests.handmade import make_pack

PAGE = mmap.PAGESIZE


class Memory:
    """Shared memory as a worker maps it; ``could_write`` as one of ``writable_uids`` does."""

    def __init__(
        self, num_pages: int, *, writable: bool = False, could_write: bool = False
    ) -> None:
        self.num_bytes = num_pages * PAGE
        descriptor = os.memfd_create("arena")
        os.ftruncate(descriptor, self.num_bytes)
        if not writable and not could_write:
            read_only = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
            os.close(descriptor)
            descriptor = read_only
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        self._mapping = mmap.mmap(descriptor, self.num_bytes, access=access)
        os.close(descriptor)
        self.address = address_of(self._mapping)

    def unmap(self) -> None:
        self._mapping.close()


@pytest.mark.parametrize("writable", [False, True])
def test_it_registers_in_ranges_and_lets_go(writable: bool) -> None:
    memory, runtime = Memory(10, writable=writable), FakeCudart(max_range_bytes=4 * PAGE)
    registration = Registration(runtime, 0, memory.address, memory.num_bytes, range_bytes=4 * PAGE)
    assert list(runtime.registered.values()) == [4 * PAGE, 4 * PAGE, 2 * PAGE]
    assert registration.read_only is not writable
    assert registration.device_address == memory.address
    registration.close()
    assert not runtime.registered
    registration.close()
    assert runtime.last_error() == 0
    memory.unmap()


def test_copies_do_not_cross_ranges() -> None:
    memory, runtime = Memory(10), FakeCudart()
    registration = Registration(runtime, 0, memory.address, memory.num_bytes, range_bytes=4 * PAGE)
    pieces = registration.pieces(3 * PAGE, 6 * PAGE)
    assert pieces == [(3 * PAGE, PAGE), (4 * PAGE, 4 * PAGE), (8 * PAGE, PAGE)]
    target = Memory(10, writable=True)
    assert runtime.copy_to_device(target.address, memory.address + 3 * PAGE, 6 * PAGE, 0)
    runtime.last_error()
    for offset, size in pieces:
        assert not runtime.copy_to_device(target.address, memory.address + offset, size, 0)


def test_memory_that_only_the_daemon_writes_may_be_refused_and_leaves_no_error() -> None:
    memory, runtime = Memory(10), FakeCudart(reads_only=False)
    with pytest.raises(RefusedError, match="invalid argument"):
        Registration(runtime, 0, memory.address, memory.num_bytes)
    assert runtime.last_error() == 0
    assert not runtime.registered
    assert "writable_uids" in explain_refusal("invalid argument (1)", memory.num_bytes)


def test_memory_that_could_be_written_to_is_made_so_for_the_moment() -> None:
    memory, runtime = Memory(10, could_write=True), FakeCudart(reads_only=False)
    registration = Registration(runtime, 0, memory.address, memory.num_bytes)
    assert runtime.registered == {memory.address: memory.num_bytes}
    assert not registration.read_only
    assert not is_writable(memory.address)
    assert runtime.last_error() == 0
    registration.close()


def test_the_daemon_s_own_user_registers_the_arena_with_nothing_configured(tmp_path: Path) -> None:
    """With a driver as most are, which registers only what could be written to."""
    pack, runtime = make_pack(tmp_path / "pack"), FakeCudart(reads_only=False)
    with (
        serving({"m": pack}) as daemon,
        Client(daemon.socket) as client,
        client.attach("m") as session,
    ):
        registration = Registration(runtime, 0, session.arena_address, session.arena_bytes)
        session.acquire(0, [0, 1]).release()
        registration.close()
        assert not is_writable(session.arena_address)


def test_a_driver_that_refuses_that_too_leaves_the_memory_read_only() -> None:
    memory = Memory(10, could_write=True)
    runtime = FakeCudart(reads_only=False, max_range_bytes=PAGE)
    with pytest.raises(RefusedError):
        Registration(runtime, 0, memory.address, memory.num_bytes)
    assert not is_writable(memory.address)
    assert runtime.last_error() == 0


def test_a_refusal_midway_leaves_nothing_registered() -> None:
    memory, runtime = Memory(10), FakeCudart(max_range_bytes=4 * PAGE)
    last = memory.address + 8 * PAGE
    assert runtime.register(last, PAGE, 0x0B) == 0  # somebody else has
    with pytest.raises(RefusedError, match="already mapped"):
        Registration(runtime, 0, memory.address, memory.num_bytes, range_bytes=4 * PAGE)
    assert runtime.registered == {last: PAGE}
    assert runtime.last_error() == 0


def test_what_failed_before_is_not_blamed_on_registering() -> None:
    memory, runtime = Memory(1), FakeCudart()
    runtime.fail(INVALID_VALUE)
    Registration(runtime, 0, memory.address, memory.num_bytes).close()
    runtime.lost = True
    with pytest.raises(DeviceLostError):
        Registration(runtime, 0, memory.address, memory.num_bytes)
    assert not runtime.registered


def test_a_device_that_is_lost_is_no_refusal() -> None:
    memory, runtime = Memory(1), FakeCudart()
    original = runtime.register

    def lose(address: int, num_bytes: int, flags: int) -> int:
        runtime.lost = True
        return original(address, num_bytes, flags)

    runtime.register = lose  # type: ignore[method-assign]
    with pytest.raises(DeviceLostError, match="unknown error"):
        Registration(runtime, 0, memory.address, memory.num_bytes)
    assert runtime.last_error() == LOST


def test_ranges_that_the_device_sees_apart_have_no_one_address() -> None:
    memory, runtime = Memory(4), FakeCudart(offset=1 << 40)
    registration = Registration(runtime, 0, memory.address, memory.num_bytes)
    assert registration.device_address == memory.address + (1 << 40)
    registration.close()
    seen = runtime.device_address
    runtime.device_address = (  # type: ignore[method-assign]
        lambda address: seen(address) ^ (PAGE if address > memory.address else 0)
    )
    apart = Registration(runtime, 0, memory.address, memory.num_bytes, range_bytes=2 * PAGE)
    assert apart.device_address == 0
