"""What an error of torch's, the driver's or Triton's means to the user of a GPU."""

from collections.abc import Callable

import torch

from expertstore.errors import DeviceLostError, DeviceMemoryError, ExpertdError

_LOST = (
    "look at the host's log (dmesg, nvidia-smi) for why, then start this worker again, or one "
    "without --device."
)
_OF_THE_DRIVER = ("CUDA error", "Triton Error [CUDA]")
_FULL = ("out of memory", "ALLOC_FAILED")
"""Of the driver, of its libraries."""


def explain(error: BaseException, name: str, free: Callable[[], str]) -> ExpertdError | None:
    """An error on the device ``name``, of which ``free`` tells the memory; None if not its own.

    That an error's text has "cuda" in it says nothing: torch writes so of tensors on two devices.
    """
    if isinstance(error, ExpertdError):
        return error
    text = str(error)
    if "captur" in text:
        return None  # Something that a graph cannot have; the device is well.
    is_driver_s = isinstance(error, torch.AcceleratorError) or (
        isinstance(error, RuntimeError) and any(words in text for words in _OF_THE_DRIVER)
    )
    if isinstance(error, torch.OutOfMemoryError) or (
        is_driver_s and any(words in text for words in _FULL)
    ):
        return DeviceMemoryError(
            f"{name} is out of memory with {free()} left; give a smaller --cache-bytes, or a "
            "shorter prompt."
        )
    if is_driver_s:
        return DeviceLostError(f"{name} does not answer any more ({text.splitlines()[0]}); {_LOST}")
    return None
