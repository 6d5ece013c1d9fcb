"""The threads that quantize."""

import os
from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch


@cache
def cores() -> ThreadPoolExecutor:
    """A thread per core, each computing alone.

    hqq is hundreds of small operations. Sharing each among all cores would mean a barrier after
    every one, where the others spin while one is not scheduled: on two busy cores that takes 5
    to 30 times as long. And a sum then depends on the number of threads.
    """
    return ThreadPoolExecutor(
        len(os.sched_getaffinity(0)), "expertd-quantizer", lambda: torch.set_num_threads(1)
    )
