"""Registering mapped memory, against a runtime that keeps the driver's rules on real mappings."""

import mmap
import os
from pathlib import Path

import pytest

from expertd_client import Client
from expertd_client.arena_mapping import address_of
from expertd_inference.device.registration import (
    RefusedError,
    Registration,
    Registrations,
    explain_refusal,
    is_writable,
)
from expertd_testing.daemon import serving
from expertd_testing.fake_cudart import INVALID_VALUE, LOST, FakeCudart
from expertd_testing.handmade import make_pack
from expertstore.errors import DeviceLostError

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
    assert registration.device_address(0) == memory.address
    registration.close()
    assert not runtime.registered
    registration.close()
    assert runtime.last_error() == 0
    memory.unmap()


def test_copies_do_not_cross_ranges() -> None:
    memory, runtime = Memory(10), FakeCudart()
    registration = Registration(runtime, 0, memory.address, memory.num_bytes, range_bytes=4 * PAGE)
    pieces = registration.pieces(3 * PAGE, 6 * PAGE)
    assert pieces == [
        (3 * PAGE, PAGE, True),
        (4 * PAGE, 4 * PAGE, True),
        (8 * PAGE, PAGE, True),
    ]
    target = Memory(10, writable=True)
    assert runtime.copy_to_device(target.address, memory.address + 3 * PAGE, 6 * PAGE, 0)
    runtime.last_error()
    for offset, size, _ in pieces:
        assert not runtime.copy_to_device(target.address, memory.address + offset, size, 0)


def test_memory_that_only_the_daemon_writes_may_be_refused_and_leaves_no_error() -> None:
    memory, runtime = Memory(10), FakeCudart(reads_only=False)
    with pytest.raises(RefusedError, match=r"invalid argument.*writable_uids"):
        Registration(runtime, 0, memory.address, memory.num_bytes)
    assert runtime.last_error() == 0
    assert not runtime.registered


def test_a_device_that_registers_nothing_is_not_asked_to() -> None:
    memory, runtime = Memory(10, writable=True), FakeCudart(registers=False)
    with pytest.raises(RefusedError, match="registers no host memory"):
        Registration(runtime, 0, memory.address, memory.num_bytes)
    assert runtime.last_error() == 0


@pytest.mark.parametrize(("granted", "expected"), [(10, [8, 2]), (7, [4, 2, 1]), (1, [1]), (0, [])])
@pytest.mark.parametrize("could_write", [False, True])
def test_what_is_granted_is_registered(
    granted: int, expected: list[int], could_write: bool
) -> None:
    """As WSL's driver does, which pins less than all."""
    memory = Memory(10, could_write=could_write)
    runtime = FakeCudart(reads_only=not could_write, max_bytes=granted * PAGE)

    def register() -> Registration:
        return Registration(
            runtime, 0, memory.address, memory.num_bytes,
            range_bytes=8 * PAGE, min_range_bytes=PAGE,
        )  # fmt: skip

    if not expected:
        with pytest.raises(RefusedError, match=r"^out of memory \(2\)"):
            register()
        return
    registration = register()
    assert [size // PAGE for size in runtime.registered.values()] == expected
    assert registration.registered_bytes == granted * PAGE
    assert not is_writable(memory.address)
    assert runtime.last_error() == 0
    if granted < 10:
        assert registration.reason == "out of memory (2)"
        assert registration.device_address(0) == 0, "kernels would read past what they can"
        # Half of this copy can be had directly.
        assert registration.pieces((granted - 1) * PAGE, 2 * PAGE) == [
            ((granted - 1) * PAGE, PAGE, True),
            (granted * PAGE, PAGE, False),
        ]
        assert registration.pieces(granted * PAGE, PAGE) == [(granted * PAGE, PAGE, False)]
    else:
        assert not registration.reason
    said = explain_refusal(registration.reason, memory.num_bytes, registration.registered_bytes)
    assert f"{granted * 4} KiB of the 40 KiB" in said.replace(".0", "")
    registration.close()
    assert not runtime.registered


def test_a_range_is_registered_once_for_all_devices() -> None:
    memory, runtime = Memory(10), FakeCudart(num_devices=2)
    ours = Registrations(runtime)
    both = [ours.take(index, memory.address, memory.num_bytes) for index in (0, 1)]
    assert both[0] is both[1]
    assert runtime.registered == {memory.address: memory.num_bytes}
    ours.give_back(both[0])
    assert runtime.registered, "the other device still copies from it"
    ours.give_back(both[1])
    assert not runtime.registered
    assert runtime.last_error() == 0
    # Whoever maps another arena there begins anew.
    ours.give_back(ours.take(1, memory.address, memory.num_bytes))
    assert runtime.last_error() == 0


def test_the_thread_s_device_stays_what_it_was() -> None:
    memory, runtime = Memory(10), FakeCudart(num_devices=2)
    registration = Registration(runtime, 1, memory.address, memory.num_bytes)
    registration.device_address(1)
    assert runtime.current == 0
    registration.close()
    assert runtime.current == 0
    with pytest.raises(DeviceLostError):
        Registration(runtime, 2, memory.address, memory.num_bytes)
    assert runtime.current == 0


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
    with pytest.raises(RefusedError) as refused:
        Registration(runtime, 0, memory.address, memory.num_bytes)
    assert "writable_uids" not in str(refused.value), "that would not help"
    assert not is_writable(memory.address)
    assert runtime.last_error() == 0


def test_what_another_has_registered_stays_the_other_s() -> None:
    memory, runtime = Memory(10), FakeCudart(max_range_bytes=4 * PAGE)
    last = memory.address + 8 * PAGE
    assert runtime.register(last, PAGE, 0x0B) == 0
    registration = Registration(
        runtime, 0, memory.address, memory.num_bytes, range_bytes=4 * PAGE, min_range_bytes=PAGE
    )
    assert registration.registered_bytes == 8 * PAGE
    assert "already mapped" in registration.reason
    registration.close()
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
    assert registration.device_address(0) == memory.address + (1 << 40)
    registration.close()
    seen = runtime.device_address
    runtime.device_address = (  # type: ignore[method-assign]
        lambda address: seen(address) ^ (PAGE if address > memory.address else 0)
    )
    apart = Registration(runtime, 0, memory.address, memory.num_bytes, range_bytes=2 * PAGE)
    assert apart.device_address(0) == 0
