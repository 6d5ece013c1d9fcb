"""The few calls of the CUDA runtime that torch does not offer, each with its return code.

torch has the memory, the streams and the events; registering host memory that is not its own, and
knowing whose an error is, it leaves to the runtime. The library is the one that torch has loaded.
"""

import ctypes
import os
from contextlib import suppress
from typing import Protocol

import torch

from expertstore.errors import DeviceError

SUCCESS = 0
_UNKNOWN = 999
ATTRIBUTE_HOST_REGISTER = 99  # cudaDevAttrHostRegisterSupported
ATTRIBUTE_READ_ONLY_REGISTER = 113  # cudaDevAttrHostRegisterReadOnlySupported
REGISTER_PORTABLE, REGISTER_MAPPED, REGISTER_READ_ONLY = 0x01, 0x02, 0x08
_HOST_TO_DEVICE = 1


class Runtime(Protocol):
    """The CUDA runtime as we use it; every ``int`` is a ``cudaError_t`` unless it says otherwise.

    A call that fails leaves its code for :meth:`last_error` as well, where the next kernel launch
    of anybody would find it.
    """

    def set_device(self, index: int) -> int:
        """The device of the calls that this thread makes from now on."""

    def current_device(self) -> int:
        """The device of the calls that this thread makes."""

    def restore_device(self, index: int) -> None:
        """As :meth:`set_device`, but does not begin to use a device that has not been used."""

    def attribute(self, attribute: int, index: int) -> int:
        """The value of a device's attribute; 0 if this runtime does not know it."""

    def register(self, address: int, num_bytes: int, flags: int) -> int:
        """Makes host memory a source of DMA."""

    def unregister(self, address: int) -> int:
        """Undoes it, for the range that begins there."""

    def device_address(self, address: int) -> int:
        """Where the device sees registered memory; 0 if it does not."""

    def copy_to_device(self, target: int, source: int, num_bytes: int, stream: int) -> int:
        """Queues a copy from host memory."""

    def last_error(self) -> int:
        """What last failed in this thread, and forgets it. What is sticky comes again."""

    def describe(self, code: int) -> str:
        """In the runtime's words."""


class Cudart:
    """:class:`Runtime` by the library that torch has loaded."""

    def __init__(self) -> None:
        """Raises DeviceError if there is none."""
        self._library = _library()
        pointer, size, number = ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int
        for name, types in {
            "cudaDeviceGetAttribute": (ctypes.POINTER(number), number, number),
            "cudaHostRegister": (pointer, size, ctypes.c_uint),
            "cudaHostUnregister": (pointer,),
            "cudaHostGetDevicePointer": (ctypes.POINTER(pointer), pointer, ctypes.c_uint),
            "cudaMemcpyAsync": (pointer, pointer, size, number, pointer),
            "cudaGetLastError": (),
        }.items():
            function = getattr(self._library, name)
            function.argtypes, function.restype = types, number
        self._library.cudaGetErrorString.argtypes = (number,)
        self._library.cudaGetErrorString.restype = ctypes.c_char_p

    def set_device(self, index: int) -> int:
        """By torch, which notes each thread's device beside CUDA."""
        try:
            torch.cuda._exchange_device(index)
        except RuntimeError:
            return self.last_error() or _UNKNOWN
        return SUCCESS

    def current_device(self) -> int:
        """By torch; the first if none answers."""
        try:
            return torch.cuda.current_device()
        except RuntimeError:
            return 0

    def restore_device(self, index: int) -> None:
        """By torch: ``cudaSetDevice`` would take hundreds of megabytes of a device for nothing."""
        with suppress(RuntimeError):
            torch.cuda._maybe_exchange_device(index)

    def attribute(self, attribute: int, index: int) -> int:
        """``cudaDeviceGetAttribute``."""
        value = ctypes.c_int(0)
        if self._library.cudaDeviceGetAttribute(ctypes.byref(value), attribute, index) != SUCCESS:
            self.last_error()
            return 0
        return value.value

    def register(self, address: int, num_bytes: int, flags: int) -> int:
        """``cudaHostRegister``."""
        return int(self._library.cudaHostRegister(address, num_bytes, flags))

    def unregister(self, address: int) -> int:
        """``cudaHostUnregister``."""
        return int(self._library.cudaHostUnregister(address))

    def device_address(self, address: int) -> int:
        """``cudaHostGetDevicePointer``."""
        seen = ctypes.c_void_p()
        code = self._library.cudaHostGetDevicePointer(ctypes.byref(seen), address, 0)
        if code != SUCCESS:
            self.last_error()
            return 0
        return seen.value or 0

    def copy_to_device(self, target: int, source: int, num_bytes: int, stream: int) -> int:
        """``cudaMemcpyAsync``."""
        return int(
            self._library.cudaMemcpyAsync(target, source, num_bytes, _HOST_TO_DEVICE, stream)
        )

    def last_error(self) -> int:
        """``cudaGetLastError``."""
        return int(self._library.cudaGetLastError())

    def describe(self, code: int) -> str:
        """``cudaGetErrorString``."""
        text: bytes | None = self._library.cudaGetErrorString(code)
        return f"{(text or b'unknown').decode(errors='replace')} ({code})"


def _library() -> ctypes.CDLL:
    """The runtime as torch's own libraries are linked to it."""
    torch.cuda.init()  # type: ignore[no-untyped-call]
    # The same name as that of the one in use gives that one, wherever it lies.
    names = [f"libcudart.so.{(torch.version.cuda or '').partition('.')[0]}", *_loaded()]
    for name in names:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    raise DeviceError(
        "The CUDA runtime library that this torch uses was not found "
        f"({', '.join(names)}); install a torch built for CUDA as a wheel."
    )


def _loaded() -> list[str]:
    """Paths of CUDA runtimes among this process's libraries."""
    with open("/proc/self/maps") as maps:  # noqa: PTH123 - no file of ours
        paths = {line.split()[-1] for line in maps if "libcudart" in line}
    return sorted(path for path in paths if os.path.isabs(path))  # noqa: PTH117
