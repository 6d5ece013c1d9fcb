"""gate and up, or up alone, to one value inside a Triton kernel, rounded as torch rounds."""

import triton
from triton import language as tl

from expertd_inference.kernels.activation import Activation, ActivationKind
from expertd_inference.kernels.gpu.triton_dequant import rounded


@triton.jit
def activate(
    gate,  # float32, rounded to DTYPE already
    up,
    KIND: tl.constexpr,  # a value of ActivationKind
    ALPHA: tl.constexpr,
    LIMIT: tl.constexpr,
    DTYPE: tl.constexpr,
):
    """``Activation``'s function of gate and up, "relu2" of gate; float32, rounded to ``DTYPE``.

    What is compared is compared such that NaN stays NaN, as in torch's clamp and relu.
    """
    if KIND == "gpt_oss":
        gate = tl.where(gate > LIMIT, LIMIT, gate)
        up = tl.where(up > LIMIT, LIMIT, tl.where(up < -LIMIT, -LIMIT, up))
        scaled = _round(gate * ALPHA, DTYPE)
        gate = _round(gate * _round(_sigmoid(scaled), DTYPE), DTYPE)
        up = _round(up + 1.0, DTYPE)
    elif KIND == "relu2":
        gate = tl.where(gate < 0.0, 0.0, gate)
        up = gate
    elif KIND == "silu":
        gate = _round(gate * _sigmoid(gate), DTYPE)
    elif KIND == "gelu":
        gate = _round(0.5 * gate * (1.0 + tl.erf(gate * 0.7071067811865476)), DTYPE)
    elif KIND == "gelu_tanh":
        inner = 0.7978845608028654 * (gate + 0.044715 * gate * gate * gate)
        # tanh(y) = 2 sigmoid(2 y) - 1
        gate = _round(gate * _sigmoid(2.0 * inner), DTYPE)
    else:
        tl.static_assert(KIND == "relu")
        gate = tl.where(gate < 0.0, 0.0, gate)
    return _round(gate * up, DTYPE)


@triton.jit
def _sigmoid(x):
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def _round(x, DTYPE: tl.constexpr):
    return rounded(x, DTYPE).to(tl.float32)


def activation_constants(activation: Activation | None) -> dict[str, str | float]:
    """What a kernel that calls :func:`activate` is compiled with; for None, one that doesn't."""
    if activation is None:
        return {"KIND": "", "ALPHA": 0.0, "LIMIT": 0.0}
    has_limit = activation.kind is ActivationKind.GPT_OSS
    return {
        "KIND": activation.kind.value,
        "ALPHA": activation.alpha,
        "LIMIT": activation.limit if has_limit else 0.0,
    }
