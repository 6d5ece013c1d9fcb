"""A worker of ours as a contestant: attached to a daemon, alone in its process.

With ``private`` it computes from a copy of the experts in memory of its own, which takes the
arena's place in its address space: kernels, trunk, directory and everything else are the same, so
what differs is whose memory the weights are in. That copy is in huge pages where the host has them
for such memory, as a program that shares nothing would have it.

Beside what :mod:`bench.peers` says it answers ``threads N`` and ``window BEGIN END``: a generation
whose tokens between these two times of the monotonic clock are counted.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

from expertd_inference.process.environment import garbage_kept, prepare_environment

CONTEXT = 64
FIRST_PROMPT = 16


def run(socket: str, model: str, threads: int, *, private: bool = False) -> None:
    """Answers the lines of stdin until it ends."""
    # As expert-run does.
    prepare_environment(device="cpu")
    with garbage_kept():
        import torch

        from expertd_inference import load_model
        from expertd_inference.engine.decoding import Decoding

    torch.set_num_threads(threads)
    imported, before = time.monotonic(), _own_bytes()
    loaded = load_model(model, socket=socket)
    loaded.generation_config.eos_token_id = None
    at_load = time.monotonic()
    if private:
        session = loaded.expertd.session
        take_private(session.arena_address, session.arena_bytes)
    vocab = loaded.config.vocab_size
    generator = torch.Generator().manual_seed(0)

    def generate(prompt_tokens: int, new_tokens: int, times: _Times) -> None:
        ids = torch.randint(10, vocab, (1, prompt_tokens), generator=generator)
        loaded.generate(
            ids,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=0,
            streamer=times,
            custom_generate=Decoding(times),
            stopping_criteria=[times.is_over],
        )

    generate(FIRST_PROMPT, 1, _Times())
    _say(
        imported=imported,
        loaded=at_load,
        first=time.monotonic(),
        own_before=before,
        kernels=loaded.expertd.kernels.name,
    )
    for line in sys.stdin:
        what, *numbers = line.split()
        times = _Times()
        match what:
            case "threads":
                torch.set_num_threads(int(numbers[0]))
                _say()
            case "huge":
                session = loaded.expertd.session
                _say(problem=make_huge(session.arena_address, session.arena_bytes))
            case "prompt":
                ids = torch.randint(10, vocab, (1, int(numbers[0])), generator=generator)
                began = time.monotonic()
                with torch.no_grad():
                    loaded(ids, logits_to_keep=1)
                _say(seconds=time.monotonic() - began)
            case "decode":
                generate(CONTEXT, int(numbers[0]) + 1, times)
                _say(seconds=times.tokens[-1] - times.tokens[0])
            case "window":
                begin, end = map(float, numbers)
                times.end_at = end
                generate(FIRST_PROMPT, 4000, times)
                inside = [each for each in times.tokens if begin <= each <= end]
                rate = (len(inside) - 1) / (inside[-1] - inside[0]) if len(inside) > 1 else 0.0
                _say(rate=rate, tokens=len(inside))
            case _:
                _say()


class _Times:
    """A streamer that notes when tokens came; the prompt comes first and is none."""

    def __init__(self) -> None:
        self.tokens: list[float] = []
        self.end_at = float("inf")
        self._prompted = False

    def put(self, _: Any) -> None:  # noqa: ANN401 - a tensor, but torch comes later
        if self._prompted:
            self.tokens.append(time.monotonic())
        self._prompted = True

    def end(self) -> None:
        """Nothing is left."""

    def is_over(self, input_ids: Any, _: Any) -> Any:  # noqa: ANN401
        """As a stopping criterion."""
        import torch

        return torch.full((len(input_ids),), time.monotonic() >= self.end_at)


def take_private(address: int, num_bytes: int) -> None:
    """Puts a private copy of what is mapped at ``address`` in its place."""
    import ctypes
    import mmap

    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
    fixed, may_move = 0x10, 1  # MAP_FIXED, MREMAP_MAYMOVE: not in Python's mmap
    private = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
    rights = mmap.PROT_READ | mmap.PROT_WRITE

    def size(value: int) -> ctypes.c_size_t:
        return ctypes.c_size_t(value)

    def checked(result: int | None) -> int:
        if result in (None, ctypes.c_void_p(-1).value):
            raise OSError(ctypes.get_errno(), "no private copy of the arena")
        return result or 0

    room = checked(libc.mmap(None, size(num_bytes), 0, private, -1, size(0)))
    moved = checked(
        libc.mremap(
            ctypes.c_void_p(address), size(num_bytes), size(num_bytes), may_move | 2,
            ctypes.c_void_p(room),
        )
    )  # fmt: skip
    here = checked(
        libc.mmap(ctypes.c_void_p(address), size(num_bytes), rights, private | fixed, -1, size(0))
    )
    ctypes.memmove(here, moved, num_bytes)
    libc.munmap(ctypes.c_void_p(moved), size(num_bytes))


def make_huge(address: int, num_bytes: int) -> str:
    """Moves private memory to huge pages, at once; why it cannot be, or nothing."""
    import ctypes

    libc = ctypes.CDLL(None, use_errno=True)
    for advice in (14, 25):  # MADV_HUGEPAGE, MADV_COLLAPSE: not all in Python's mmap
        if libc.madvise(ctypes.c_void_p(address), ctypes.c_size_t(num_bytes), advice):
            return os.strerror(ctypes.get_errno())
    return ""


def _own_bytes() -> int:
    for line in Path("/proc/self/smaps_rollup").read_text().splitlines():
        if line.startswith("Pss_Anon:"):
            return int(line.split()[1]) << 10
    return 0


def _say(**values: Any) -> None:  # noqa: ANN401 - what JSON can hold
    print(json.dumps(values), flush=True)


if __name__ == "__main__":
    {"run": run}[sys.argv[1]](**json.loads(sys.argv[2]))
