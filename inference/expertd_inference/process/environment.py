"""What a process that is a worker and nothing else sets before it imports torch and transformers.

Most of the time from such a process's start to its first token goes into these imports, and most
of that into packages that no worker uses: transformers imports what it finds installed (its
cache module the whole of ``hqq``, which imports ``torch._inductor``), for features that it might
be asked for.
"""

import gc
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from expertd_inference.process.models_scan import quicken_models_scan

UNUSED_PACKAGES = (
    "bitsandbytes",
    "deepspeed",
    "hqq",
    "kernels",
    "librosa",
    "pandas",
    "peft",
    "scipy",
    "sklearn",
    "soundfile",
    "soxr",
    "torchao",
    "torchaudio",
    "torchvision",
)
"""What transformers would import, and no worker uses."""

UNUSED_ON_CPU = ("accelerate", "flash_attn", "flash_attn_interface", "triton")
"""And these are for GPUs."""


def prepare_environment(*, verbose: bool = False, device: str | None = None) -> None:
    """No network, threads that sleep while they wait, no noise unless ``verbose``, quick imports.

    ``device``, as in :class:`~expertd_inference.settings.DeviceSettings`, is where the worker is to
    compute. What it then has no use for is as if it were not installed, from here to the
    process's end; without ``device`` nothing is.
    """
    # No network, ever: all that is needed lies in the pack.
    os.environ["HF_HUB_OFFLINE"] = "1"
    # OpenMP's threads spin while they wait, and take the cores from each other as soon as
    # workers have more threads than there are idle cores: 5 tokens/s spinning, 120 sleeping.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    if not verbose:
        os.environ["TRANSFORMERS_VERBOSITY"] = "error"
        os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
        warnings.simplefilter("ignore")
    if device is not None:
        for name in UNUSED_PACKAGES + (UNUSED_ON_CPU if device == "cpu" else ()):
            # Python's own way to say that there is no such module; one that is imported stays.
            sys.modules.setdefault(name, None)  # type: ignore[arg-type]
        quicken_models_scan()


def prepare_front() -> None:
    """Of a process that uses transformers for tokenizers alone: torch is as if not installed.

    To be called before anything imports transformers: a second and 200 MB less.
    """
    prepare_environment(device="cpu")
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


@contextmanager
def garbage_kept() -> Iterator[None]:
    """No garbage collection in the block, which is to make much that stays, as imports do.

    Else the collector looks at these million objects again and again while they become more: a
    third of the time of importing torch and transformers.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            if not gc.get_freeze_count():
                # Both together make old what is new, without looking at it.
                gc.freeze()
                gc.unfreeze()
            gc.enable()
