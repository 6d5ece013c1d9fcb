"""One MoE layer over a device cache: what ``kernels.cpu.reference`` defines, on a GPU.

Up to ``MAX_GEMV_TOKENS`` tokens take :mod:`.triton_gemv`, two launches that a CUDA graph can
hold; more take :mod:`.triton_gemm`. Neither waits for the device, and which of them runs
depends on the number of tokens alone; of an exact wave any number takes the first, whose sums are
those of each pair by itself.
"""

import torch
from torch import Tensor

from expertd_inference.kernels.gpu.triton_blocks import MAX_GEMV_PAIRS, MAX_GEMV_TOKENS, gemm_blocks
from expertd_inference.kernels.gpu.triton_form import TRITON_DTYPES, record_form
from expertd_inference.kernels.gpu.triton_gemm import launch_experts_gemm
from expertd_inference.kernels.gpu.triton_gemv import aligned, launch_experts_gemv
from expertd_inference.kernels.gpu.triton_route import route
from expertd_inference.kernels.wave import CachedWave, Routed
from expertstore.pack.layout import DOWN


def fill_slots_cached(slots: Tensor, routed: Routed, wave: CachedWave, /) -> None:
    """Writes the weighted results of the experts that are in the cache into ``slots`` [T, k, H].

    Where an expert has no slot, or where a routing names no expert, ``slots`` is left alone. All
    tensors are on one device, and the routing is read there: a call waits for nothing, and with at
    most ``MAX_GEMV_TOKENS`` tokens it can be captured in a CUDA graph.

    The rounding points are those of the reference, the order of sums is not, and a few tokens'
    weights are not rounded to the activations' dtype. Equal arguments give equal bits, whatever
    else is cached and in which slots.

    Raises ValueError if the shapes or dtypes do not fit, or if there is no kernel for the
    activation.
    """
    _check(slots, routed, wave)
    if not len(routed):
        return
    num_at_once = len(routed)
    if wave.exact:
        num_at_once = min(num_at_once, MAX_GEMV_PAIRS // routed.top_k)
    # Triton launches on the current device, which is another thread's or another worker's choice.
    with torch.cuda.device_of(routed.rows):  # type: ignore[no-untyped-call]
        parts = torch.split(slots, num_at_once)
        for part, rows in zip(parts, routed.split(num_at_once), strict=True):
            _launch(part, rows, wave)


def _launch(slots: Tensor, routed: Routed, wave: CachedWave) -> None:
    index, cache, slot_of, spec = routed.index, wave.cache, wave.slot_of, wave.spec
    assert spec.activation is not None
    num_tokens, top_k = index.shape
    gate_up, down = (record_form(spec.layout, name) for name in (spec.layout.inward.name, DOWN))
    rows, weights = aligned(routed.rows), routed.weights.contiguous()
    inner = torch.empty(num_tokens * top_k, down.columns, dtype=rows.dtype, device=rows.device)
    if wave.exact or num_tokens <= MAX_GEMV_TOKENS:
        routing = (index.contiguous(), weights, slot_of, cache)
        launch_experts_gemv(inner, rows, *routing, gate_up, spec.activation)
        launch_experts_gemv(slots, inner, *routing, down, None)
        return
    share = -(-num_tokens * top_k // slot_of.numel())
    blocks = [gemm_blocks(form, share) for form in (gate_up, down)]
    tiles = route(index, slot_of, blocks[0].tokens)
    launch_experts_gemm(inner, rows, tiles, weights, cache, gate_up, spec.activation, blocks[0])
    launch_experts_gemm(slots, inner, tiles, weights, cache, down, None, blocks[1])


def _check(slots: Tensor, routed: Routed, wave: CachedWave) -> None:
    index, cache, slot_of, spec = routed.index, wave.cache, wave.slot_of, wave.spec
    num_tokens, hidden_size = routed.rows.shape
    shape = (num_tokens, routed.top_k, hidden_size)
    if slots.shape != shape or not slots.is_contiguous():
        raise ValueError(f"slots are {tuple(slots.shape)}, or strided, instead of {shape}")
    if index.shape != shape[:2] or routed.weights.shape != shape[:2]:
        raise ValueError("the routing has not a row for each token")
    if index.dtype not in {torch.int32, torch.int64}:
        raise ValueError(f"experts are numbered in {index.dtype}")
    for tensor in (slots, routed.rows, routed.weights):
        if tensor.dtype not in TRITON_DTYPES:
            raise ValueError(f"there is no GPU kernel for {tensor.dtype}")
    if cache.dtype != torch.uint8 or cache.ndim != 2 or not cache.is_contiguous():
        raise ValueError("the cache is not a contiguous matrix of bytes")
    if cache.shape[1] < spec.layout.record_bytes or cache.shape[1] % 64:
        raise ValueError(
            f"slots of {cache.shape[1]} bytes cannot hold records of {spec.layout.record_bytes} "
            "with their parts on 64-byte boundaries"
        )
    if slot_of.dtype != torch.int32 or slot_of.ndim != 1 or not slot_of.is_contiguous():
        raise ValueError("the table of slots is not a contiguous list of int32")
    if spec.layout.inward.in_features != hidden_size:
        raise ValueError(f"the experts do not take {hidden_size} values")
    if spec.activation is None:
        raise ValueError("there is no GPU kernel for the activation of these experts")
