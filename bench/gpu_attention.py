"""What torch's attention does on a GPU: which kernel it chooses, and what new lengths cost."""

import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from bench.gpu_rows import Rows
from bench.gpu_timing import device_seconds

CHOICES = {0: "math", 1: "flash", 2: "efficient", 3: "cudnn"}
_HEADS, _KV_HEADS, _DIMENSION = 32, 4, 128
_LENGTHS = (64, 2048, 8192)


def measure_attention(rows: Rows, device: str) -> None:
    """With cuDNN's kernels allowed, and without: a plan per length of keys, and its errors."""
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    for allowed in (True, False):
        with _cudnn(allowed):
            name = "with" if allowed else "without"
            for kv_heads in (_KV_HEADS, 8):
                with rows.part(f"decode with growing keys, {kv_heads} heads, {name} cuDNN") as row:
                    query, keys = _tensors(kv_heads, 100, device, dtype)
                    chosen = torch._fused_sdp_choice(
                        query, keys, keys, None, 0.0, False, enable_gqa=True
                    )
                    row["choice"] = CHOICES.get(int(chosen), str(chosen))
                    # Lengths that nothing has planned for yet.
                    first = 100 if allowed else 130
                    row.update(_growing(range(first, first + 10), kv_heads, device, dtype))
    if device != "cuda":
        rows.skipped("attention over a static cache")
        return
    for allowed in (False, True):
        for length in _LENGTHS:
            title = f"masked static cache of {length}, {'with' if allowed else 'without'} cuDNN"
            with _cudnn(allowed), rows.part(title) as row:
                row.update(_static(length, dtype))


def _growing(lengths: range, kv_heads: int, device: str, dtype: torch.dtype) -> dict[str, float]:
    """Milliseconds of a call with a length that is new, and the largest error."""
    milliseconds, errors = [], []
    _, room = _tensors(kv_heads, 1024, device, dtype)
    for length in lengths:
        query, _ = _tensors(kv_heads, 1, device, dtype)
        keys = room.narrow(2, 0, length)
        _wait(device)
        begin = time.perf_counter()
        found = functional.scaled_dot_product_attention(query, keys, keys, enable_gqa=True)
        _wait(device)
        milliseconds.append((time.perf_counter() - begin) * 1e3)
        errors.append(_error(found, query, keys, None))
    return {
        "median_ms": statistics.median(milliseconds),
        "max_ms": max(milliseconds),
        "error": max(errors),
    }


def _static(length: int, dtype: torch.dtype) -> dict[str, float]:
    """Over a whole static cache, of which forty keys count; heads repeated, as transformers do."""
    query, keys = _tensors(_KV_HEADS, length, "cuda", dtype)
    mask = torch.zeros(1, 1, 1, length, dtype=torch.bool, device="cuda")
    mask[..., :40] = True

    def attend() -> torch.Tensor:
        wide = keys[:, :, None].expand(1, _KV_HEADS, _HEADS // _KV_HEADS, length, _DIMENSION)
        key, value = (
            wide.reshape(1, _HEADS, length, _DIMENSION),
            wide.reshape(1, _HEADS, length, _DIMENSION),
        )
        return functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)

    begin = time.perf_counter()
    found = attend()
    torch.cuda.synchronize()
    first = time.perf_counter() - begin
    return {
        "first_ms": first * 1e3,
        "gpu_us": device_seconds(attend) * 1e6,
        "error": _error(found, query, keys, mask),
    }


def _tensors(
    kv_heads: int, length: int, device: str, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """A token's query, and keys that serve as values too."""
    query = torch.randn(1, _HEADS, 1, _DIMENSION, device=device, dtype=dtype)
    return query, torch.randn(1, kv_heads, length, _DIMENSION, device=device, dtype=dtype)


def _error(
    found: torch.Tensor, query: torch.Tensor, keys: torch.Tensor, mask: torch.Tensor | None
) -> float:
    with sdpa_kernel(SDPBackend.MATH):
        expected = functional.scaled_dot_product_attention(
            query.float(), keys.float(), keys.float(), attn_mask=mask, enable_gqa=True
        )
    return float((found.float() - expected).norm() / expected.norm())


@contextmanager
def _cudnn(allowed: bool) -> Iterator[None]:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    torch.backends.cuda.enable_cudnn_sdp(allowed)
    try:
        yield
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
