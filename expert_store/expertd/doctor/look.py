"""Looks at this host. Nothing is changed, and nothing takes long."""

import ctypes
import fcntl
import importlib.util
import mmap
import os
import platform
import re
import resource
import shutil
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from importlib import metadata
from pathlib import Path

from expertd.disk.record_file import RecordFile
from expertd.doctor.gpu import find_driver
from expertd.doctor.host import DaemonPlace, Disk, Host, Kernel, Kernels, Memory, PackOnDisk
from expertd.settings.config import ServeConfig
from expertstore.errors import PackError
from expertstore.native import load
from expertstore.pack.manifest import Manifest, read_manifest
from expertstore.shared.host_memory import memory_available, memory_total

PACKAGES = ("grpcio", "numpy", "torch", "transformers")
_SHMEM = Path("/sys/kernel/mm/transparent_hugepage/shmem_enabled")
_MADV_POPULATE_READ = 22
_READ_SECONDS = 0.5
_READ_BYTES = 2 << 20
_CAP_IPC_LOCK = 1 << 14


def look(path: Path | None, place: DaemonPlace) -> Host:
    """At the host, and the pack or the disk at ``path`` (by default of the current directory)."""
    return Host(
        _kernel(),
        _memory(),
        _disk(Path.cwd() if path is None else path, is_pack=path is not None),
        find_driver(),
        _versions(),
        _wanted(),
        _kernels(),
        place,
    )


def _kernel() -> Kernel:
    system = os.uname()
    chosen = None
    with suppress(OSError):
        found = re.search(r"\[(\w+)\]", _SHMEM.read_text())
        chosen = found[1] if found else None
    return Kernel(system.release, system.machine, _seals_memory(), _populates(), chosen)


def _seals_memory() -> bool:
    try:
        fd = os.memfd_create("expertd-doctor", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    except OSError:
        return False
    try:
        fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    except OSError:
        return False
    finally:
        os.close(fd)
    return True


def _populates() -> bool:
    with mmap.mmap(-1, mmap.PAGESIZE) as page:
        try:
            page.madvise(_MADV_POPULATE_READ)
        except OSError:
            return False
    return True


def _memory() -> Memory:
    limit, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = limit == resource.RLIM_INFINITY or _may_lock()
    return Memory(
        os.sysconf("SC_PHYS_PAGES") * mmap.PAGESIZE,
        memory_total(),
        memory_available(),
        None if unlimited else limit,
    )


def _may_lock() -> bool:
    """Whether a capability lifts the limit."""
    with suppress(OSError):
        found = re.search(r"(?m)^CapEff:\s*(\w+)", Path("/proc/self/status").read_text())
        return bool(found and int(found[1], 16) & _CAP_IPC_LOCK)
    return False


def _disk(path: Path, *, is_pack: bool) -> Disk:
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    if not is_pack:
        return Disk(path, free, _writes_direct(path))
    try:
        manifest = read_manifest(path).manifest
        file = max((path / each.name for each in manifest.files), key=_size)
        record_file = RecordFile(file, direct=True)
    except PackError as error:
        return Disk(path, free, None, pack_error=str(error).rstrip("."))
    try:
        return Disk(path, free, record_file.direct, _pack(manifest, record_file, _size(file)))
    finally:
        record_file.close()


def _pack(manifest: Manifest, file: RecordFile, size: int) -> PackOnDisk:
    rate = None
    with suppress(OSError, EOFError):
        rate = _read_rate(file, size)
    return PackOnDisk(manifest.expert_bytes, manifest.working_set_bytes, rate)


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else -1


def _writes_direct(directory: Path) -> bool | None:
    """Tried with a file that has no name, and is gone when it is closed."""
    try:
        os.close(os.open(directory, os.O_TMPFILE | os.O_RDWR, 0o600))
    except OSError:
        return None
    try:
        os.close(os.open(directory, os.O_TMPFILE | os.O_RDWR | os.O_DIRECT, 0o600))
    except OSError:
        return False
    return True


def _read_rate(file: RecordFile, size: int) -> float:
    """Bytes per second with as many reads under way as the loader has."""
    piece = min(_READ_BYTES, size) // mmap.PAGESIZE * mmap.PAGESIZE
    places = range(0, size - piece + 1, piece)
    began = time.perf_counter()

    def read(first: int) -> int:
        done = 0
        with mmap.mmap(-1, piece) as buffer, memoryview(buffer) as view:
            while not done or time.perf_counter() < began + _READ_SECONDS:
                file.read_into(view, places[(first + 7919 * done) % len(places)])
                done += 1
        return done

    with ThreadPoolExecutor(ServeConfig.loader_threads) as pool:
        done = sum(pool.map(read, range(ServeConfig.loader_threads)))
    return done * piece / (time.perf_counter() - began)


def _versions() -> Mapping[str, str | None]:
    found: dict[str, str | None] = {"python": platform.python_version()}
    for name in ("expertd", *PACKAGES):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def _wanted() -> Mapping[str, str]:
    """Ranges by package, as ``expertd`` was installed with."""
    found = {}
    with suppress(metadata.PackageNotFoundError):
        for line in metadata.requires("expertd") or ():
            name, wanted = re.match(r"([\w.-]+)\s*([^;\s]*)", line).groups()  # type: ignore[union-attr]
            if ";" not in line:
                found[name] = wanted
    return found


def _kernels() -> Kernels:
    spec = importlib.util.find_spec("expertd_inference")
    if spec is None or spec.origin is None:
        return Kernels("", "the worker is not installed")
    path = Path(spec.origin).parent / "kernels/native/libexpertd_kernels.so"
    loaded = load(path, functions=["expertd_use_isa"])
    if loaded.library is None:
        return Kernels("", loaded.reason)
    loaded.library.expertd_use_isa.argtypes = [ctypes.c_char_p]
    loaded.library.expertd_use_isa.restype = ctypes.c_char_p
    variant = loaded.library.expertd_use_isa(None)
    if not variant:
        return Kernels("", "none was built for this processor")
    return Kernels(variant.decode())
