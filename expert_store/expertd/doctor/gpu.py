"""What NVIDIA's driver says, asked by ctypes: neither torch nor the CUDA toolkit is needed."""

import ctypes
from ctypes import byref, c_int, c_size_t

from expertd.doctor.host import Driver, Gpu

_LIBRARY = "libcuda.so.1"
_NO_DEVICE = 100
_MAJOR, _MINOR = 75, 76
_HOST_REGISTER, _HOST_REGISTER_READ_ONLY = 99, 113
_NAME_BYTES = 256


def find_driver(library: ctypes.CDLL | None = None) -> Driver | None:
    """None if none is installed."""
    try:
        cuda = library or ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    number = c_int()
    version = ""
    if not cuda.cuDriverGetVersion(byref(number)):
        version = f"{number.value // 1000}.{number.value % 1000 // 10}"
    failed = cuda.cuInit(0)
    if failed == _NO_DEVICE:
        return Driver(version)
    if failed:
        return Driver(version, error=f"cuInit returns {failed}")
    count = c_int()
    cuda.cuDeviceGetCount(byref(count))
    return Driver(version, tuple(_gpu(cuda, ordinal) for ordinal in range(count.value)))


def _gpu(cuda: ctypes.CDLL, ordinal: int) -> Gpu:
    device, size = c_int(), c_size_t()
    name = ctypes.create_string_buffer(_NAME_BYTES)
    cuda.cuDeviceGet(byref(device), ordinal)
    cuda.cuDeviceGetName(name, _NAME_BYTES, device)
    cuda.cuDeviceTotalMem_v2(byref(size), device)

    def attribute(which: int) -> int:
        value = c_int()
        return 0 if cuda.cuDeviceGetAttribute(byref(value), which, device) else value.value

    return Gpu(
        name.value.decode(errors="replace"),
        size.value,
        (attribute(_MAJOR), attribute(_MINOR)),
        bool(attribute(_HOST_REGISTER)),
        bool(attribute(_HOST_REGISTER_READ_ONLY)),
    )
