"""What driver, GPU and host do by themselves: registering host memory, launching, attention."""

import ctypes
import mmap
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from bench.gpu_attention import measure_attention
from bench.gpu_rig import Rig
from bench.gpu_rows import Rows
from bench.gpu_timing import device_seconds, graph_of, graph_seconds, host_seconds
from expertd_client.arena_mapping import address_of
from expertd_inference.device.cudart import (
    ATTRIBUTE_HOST_REGISTER,
    ATTRIBUTE_READ_ONLY_REGISTER,
    REGISTER_MAPPED,
    REGISTER_PORTABLE,
    REGISTER_READ_ONLY,
    Cudart,
    Runtime,
)

ATTRIBUTES = {
    "HostRegisterSupported": ATTRIBUTE_HOST_REGISTER,
    "HostRegisterReadOnlySupported": ATTRIBUTE_READ_ONLY_REGISTER,
    "PageableMemoryAccess": 88,
    "CanUseHostPointerForRegisteredMem": 91,
    "PageableMemoryAccessUsesHostPageTables": 100,
    "AsyncEngineCount": 40,
    "MultiProcessorCount": 16,
    "L2CacheSize": 38,
}
PAGEABLE_ACCESS = ATTRIBUTES["PageableMemoryAccess"]
_PLAIN = REGISTER_PORTABLE | REGISTER_MAPPED
_BYTES, _FAKE_BYTES = 2 << 30, 1 << 20
_RECORDS = (2654208, 99090432)
"""Bytes of a record of the 30B-A3B shape and of Mixtral's, in 4 bit."""
_FILL = 7
_GRAPHS = (60, 3000)
_PROT_READ, _PROT_WRITE = 1, 2


@dataclass(frozen=True)
class Host:
    """The GPU that is looked at; without one the CPU and a runtime that registers nothing."""

    runtime: Runtime
    device: str
    num_bytes: int

    @property
    def on_gpu(self) -> bool:
        """Whether it is one."""
        return self.device == "cuda"


def measure(rig: Rig, rows: Rows) -> None:
    """All of it, part by part."""
    host = _host(rig)
    with rows.part("attributes") as row:
        row.update({name: host.runtime.attribute(a, 0) for name, a in ATTRIBUTES.items()})
    for how in ("read-only descriptor", "read-only mapping", "made writable", "writable"):
        for flags in (_PLAIN | REGISTER_READ_ONLY, _PLAIN):
            if flags == _PLAIN or how.startswith("read-only"):
                name = "as read-only" if flags != _PLAIN else "plainly"
                with rows.part(f"registering, {how}, {name}") as row:
                    _register(host, how, flags, row)
    if host.on_gpu:
        with rows.part("copies") as row:
            _copies(row)
    else:
        rows.skipped("copies")
    with rows.part("host's microseconds per call") as row:
        _calls(host, row)
    _launches(host, rows)
    measure_attention(rows, host.device)


def measure_hmm(rig: Rig, rows: Rows) -> None:
    """Only where the driver says that kernels read pageable memory: a range nobody registered."""
    host = _host(rig)
    what = "kernels read memory that is not registered"
    if not host.on_gpu:
        return rows.skipped(what)
    if not host.runtime.attribute(PAGEABLE_ACCESS, 0):
        return rows.put(what, supported=0)
    from expertd_inference.kernels.gpu import triton_gather

    with rows.part(what) as row, _mapping("read-only descriptor", 64 * _RECORDS[0]) as address:
        size, where = _RECORDS[0], torch.device("cuda")
        slots = torch.empty(64, size, dtype=torch.uint8, device=where)
        resolution = triton_gather.Resolution.empty(1, where)
        resolution.source[:64] = torch.arange(64) * size
        resolution.target[:64] = torch.arange(64, dtype=torch.int32)

        def gather() -> None:
            triton_gather.gather(resolution, slots, arena=address, num_items=64, record_bytes=size)

        row["GBps"] = 64 * size / device_seconds(gather) / 1e9
        row["right"] = bool((slots == _FILL).all())
    return None


def _host(rig: Rig) -> Host:
    if not rig.fake:
        torch.ones(1, device="cuda")
        return Host(Cudart(), "cuda", _BYTES)
    from expertd_testing.fake_cudart import FakeCudart

    return Host(FakeCudart(reads_only=False), "cpu", _FAKE_BYTES)


@contextmanager
def _mapping(how: str, num_bytes: int) -> Iterator[int]:
    """The address of shared memory full of ``_FILL``, mapped as a worker may have it."""
    descriptor = os.memfd_create("probe")
    os.ftruncate(descriptor, num_bytes)
    with mmap.mmap(descriptor, num_bytes) as filled:
        ctypes.memset(address_of(filled), _FILL, num_bytes)
    if how == "read-only descriptor":
        opened = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY)
        os.close(descriptor)
        descriptor = opened
    access = mmap.ACCESS_WRITE if how == "writable" else mmap.ACCESS_READ
    mapped = mmap.mmap(descriptor, num_bytes, access=access)
    os.close(descriptor)
    try:
        yield address_of(mapped)
    finally:
        mapped.close()


def _register(host: Host, how: str, flags: int, row: dict[str, Any]) -> None:
    """What the driver says to it; where it agrees, how fast copies are, and what a second gets."""
    runtime, size = host.runtime, host.num_bytes
    libc = ctypes.CDLL(None, use_errno=True)

    def protect(how: int) -> int:
        return int(libc.mprotect(ctypes.c_void_p(address), ctypes.c_size_t(size), how))

    with _mapping(how, size) as address:
        if how == "made writable":
            row["mprotect"] = protect(_PROT_READ | _PROT_WRITE)
        begin = time.perf_counter()
        row["code"] = code = runtime.register(address, size, flags)
        row["s_per_GiB"] = (time.perf_counter() - begin) / size * (1 << 30)
        if how == "made writable":
            row["mprotect_back"] = protect(_PROT_READ)
        if code:
            row["words"] = runtime.describe(code)
            runtime.last_error()
            return
        seen = runtime.device_address(address)
        row["kernels_see_it"] = "at its address" if seen == address else hex(seen)
        row["second_time"] = runtime.register(address, size, flags)
        runtime.last_error()
        if host.on_gpu:
            _copy_registered(host, address, row)
        begin = time.perf_counter()
        row["unregister"] = runtime.unregister(address)
        row["unregister_s"] = time.perf_counter() - begin


def _copy_registered(host: Host, address: int, row: dict[str, Any]) -> None:
    stream = torch.cuda.Stream()
    target = torch.empty(host.num_bytes // 2, dtype=torch.uint8, device="cuda")
    for piece in _RECORDS:
        count = target.nbytes // piece
        best = float("inf")
        for _ in range(4):
            torch.cuda.synchronize()
            begin = time.perf_counter()
            for place in range(0, count * piece, piece):
                row["copy"] = host.runtime.copy_to_device(
                    target.data_ptr() + place, address + place, piece, stream.cuda_stream
                )
            stream.synchronize()
            best = min(best, time.perf_counter() - begin)
        row[f"GBps_of_{piece}"] = count * piece / best / 1e9
    row["right"] = bool((target[: count * piece] == _FILL).all())


def _copies(row: dict[str, Any]) -> None:
    """The link's limit and the memory's; and what filling a pinned ring takes of a core."""
    pinned = torch.ones(1 << 30, dtype=torch.uint8, pin_memory=True)
    target = torch.empty_like(pinned, device="cuda")
    other = torch.empty_like(target)
    seconds = device_seconds(lambda: target.copy_(pinned, non_blocking=True))
    row["pinned_GBps"] = pinned.nbytes / seconds / 1e9
    seconds = device_seconds(lambda: other.copy_(target))
    row["device_GBps_read_and_written"] = 2 * target.nbytes / seconds / 1e9
    source = torch.ones(256 << 20, dtype=torch.uint8)
    ring = pinned[: 8 << 20]
    begin = time.perf_counter()
    for start in range(0, source.nbytes, ring.nbytes):
        ctypes.memmove(ring.data_ptr(), source.data_ptr() + start, ring.nbytes)
    row["memmove_to_pinned_GBps"] = source.nbytes / (time.perf_counter() - begin) / 1e9


def _calls(host: Host, row: dict[str, Any]) -> None:
    x = torch.zeros(2048, device=host.device, dtype=torch.bfloat16)
    calls: dict[str, Callable[[], object]] = {"add": lambda: x + x, "to_float": x.float}
    if host.on_gpu:
        index = torch.zeros(1, 8, dtype=torch.int64, device="cuda")
        back = torch.empty(1, 8, dtype=torch.int64, pin_memory=True)
        table = torch.zeros(128, dtype=torch.int32)
        stream, other = torch.cuda.current_stream(), torch.cuda.Stream()

        def event() -> Any:  # noqa: ANN401 - torch's
            made = torch.cuda.Event(enable_timing=True)
            made.record(stream)
            return made

        def round_trip() -> None:
            back.copy_(index, non_blocking=True)
            stream.synchronize()

        calls |= {
            "round_trip": round_trip,
            "timing_event": event,
            "event_and_wait": lambda: other.wait_event(event()),
            "query": event().query,
            "pin_and_send": lambda: table.pin_memory().to("cuda", non_blocking=True),
            "current_stream": lambda: torch.cuda.current_stream(x.device),
        }
    for name, call in calls.items():
        row[name] = host_seconds(call, 1000 if host.on_gpu else 10) * 1e6


def _launches(host: Host, rows: Rows) -> None:
    x = torch.zeros(2048, device=host.device, dtype=torch.bfloat16)

    def norm() -> torch.Tensor:
        """As transformers' models have it."""
        wide = x.to(torch.float32)
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
        return x * wide.to(x.dtype)

    norms: dict[str, Callable[[], object]] = {
        "RMSNorm of transformers": norm,
        "F.rms_norm": lambda: torch.nn.functional.rms_norm(x, (2048,), x, 1e-6),
    }
    for name, call in norms.items():
        with rows.part(name) as row:
            row["host_us"] = host_seconds(call, 200 if host.on_gpu else 5) * 1e6
            if host.on_gpu:
                row["gpu_us_in_a_graph"] = graph_seconds(call, 100) / 100 * 1e6
    for count in _GRAPHS:
        if not host.on_gpu:
            rows.skipped(f"graph of {count} small kernels")
            continue
        with rows.part(f"graph of {count} small kernels") as row:
            graph = graph_of(lambda: x + x, count)
            seconds = device_seconds(graph.replay)
            row.update(gpu_us=seconds * 1e6, us_per_kernel=seconds / count * 1e6)
            row["launch_host_us"] = host_seconds(graph.replay, 5) * 1e6
