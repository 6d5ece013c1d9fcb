"""Whether torch can compute on a GPU here, told without importing torch."""

import ctypes
import importlib.util
import re
from pathlib import Path


def is_cuda_usable() -> bool:
    """As ``torch.cuda.is_available()``: a torch for CUDA, and a driver that has a device for it.

    A device file tells neither: WSL has another one, and a container may have one without a driver.
    """
    return _torch_is_for_cuda() and _num_devices() > 0


def _torch_is_for_cuda() -> bool:
    found = importlib.util.find_spec("torch")
    for folder in (found.submodule_search_locations or ()) if found else ():
        version = Path(folder, "version.py")
        if version.is_file():
            # cuda: Optional[str] = '13.0'
            return bool(re.search(r"^cuda\b.*=\s*['\"]", version.read_text(), re.MULTILINE))
    return False


def _num_devices(library: str = "libcuda.so.1") -> int:
    """Those that ``CUDA_VISIBLE_DEVICES`` leaves; 0 without a driver, or with one that fails."""
    try:
        driver = ctypes.CDLL(library)
    except OSError:
        return 0
    count = ctypes.c_int(0)
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return 0
    return count.value
