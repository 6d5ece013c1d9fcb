"""Attention on a GPU without cuDNN, whatever else in the process wants.

On compute capability 9 and 10 torch's first choice for attention is cuDNN's, which plans anew for
each length of the keys: 22 ms to a second for every token of a growing cache. On 10 it has also
given wrong results with fewer than 8 heads of keys and values (pytorch #193893).

torch has one switch for the whole process. It is turned while a step of ours runs and then put
back, so other models in the process choose as before. Only one that another thread calls at that
very moment goes without cuDNN too: slower or faster, and correct.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

_lock = threading.Lock()
_num_inside = 0
_before = True


@contextmanager
def without_cudnn_attention() -> Iterator[None]:
    """Around a step on a GPU; several threads may be inside at once."""
    global _num_inside, _before
    with _lock:
        if not _num_inside:
            _before = torch.backends.cuda.cudnn_sdp_enabled()  # type: ignore[no-untyped-call]
            torch.backends.cuda.enable_cudnn_sdp(False)
        _num_inside += 1
    try:
        yield
    finally:
        with _lock:
            _num_inside -= 1
            if not _num_inside:
                torch.backends.cuda.enable_cudnn_sdp(_before)
