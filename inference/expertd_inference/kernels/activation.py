"""What stands between an expert's two matrices, by name, so that kernels can compute it.

An experts module of transformers has a function for it, ``_apply_gate``. Only the reference can
call that; everything else needs to know what it does.
"""

import functools
import math
import sys
from dataclasses import dataclass
from enum import Enum
from typing import Any

from torch import nn
from transformers import activations
from transformers.integrations import moe

_GPT_OSS = "transformers.models.gpt_oss.modeling_gpt_oss"


class ActivationKind(Enum):
    """The function of gate and up, or of up alone.

    ``limit`` and ``alpha`` are :class:`Activation`'s.
    """

    SILU = "silu"
    """gate · sigmoid(gate) · up"""
    GELU = "gelu"
    """gelu(gate) · up, with the error function"""
    GELU_TANH = "gelu_tanh"
    """gelu(gate) · up, in the approximation by tanh"""
    RELU = "relu"
    """max(gate, 0) · up"""
    GPT_OSS = "gpt_oss"
    """g · sigmoid(alpha · g) · (u + 1), where g = min(gate, limit) and u = up within ± limit"""
    RELU2 = "relu2"
    """max(up, 0)², of experts without a gate"""


@dataclass(frozen=True)
class Activation:
    """A kind with its constants; ``alpha`` and ``limit`` are of GPT_OSS alone.

    The operations are rounded to the activations' dtype as torch does it: after the
    activation of gate and after each product, sum or clamp.
    """

    kind: ActivationKind
    alpha: float = 1.0
    limit: float = math.inf


_KINDS: dict[type[nn.Module], ActivationKind] = {
    nn.SiLU: ActivationKind.SILU,
    activations.SiLUActivation: ActivationKind.SILU,
    activations.GELUTanh: ActivationKind.GELU_TANH,
    activations.GELUActivation: ActivationKind.GELU,
    nn.ReLU: ActivationKind.RELU,
}
_WITHOUT_GATE = {activations.ReLUSquaredActivation: ActivationKind.RELU2}


def activation_of(experts: nn.Module) -> Activation | None:
    """The activation of an experts module of transformers; None if it is none of ours.

    It is told by identity: a class that brings an ``_apply_gate`` or an ``act_fn`` of its own
    may do anything.
    """
    module: Any = experts
    if not module.has_gate:
        kind = _WITHOUT_GATE.get(type(module.act_fn))
        return None if kind is None else Activation(kind)
    apply_gate = getattr(module, "_apply_gate", None)
    apply_gate = getattr(apply_gate, "__func__", apply_gate)
    # Whose experts these are has been imported, and nothing else need be.
    gpt_oss: Any = sys.modules.get(_GPT_OSS)
    if gpt_oss is not None and apply_gate is gpt_oss.GptOssExperts._apply_gate:
        return Activation(ActivationKind.GPT_OSS, float(module.alpha), float(module.limit))
    if apply_gate is not moe._default_apply_gate:
        return None
    return activation_of_function(getattr(module, "act_fn", None))


def activation_of_function(function: Any) -> Activation | None:  # noqa: ANN401 - whatever is there
    """The activation ``function(gate) * up``; None if it is none of ours."""
    kind = _KINDS.get(type(function))
    if function is nn.functional.silu:  # Lfm2Moe's, which has no module of it
        kind = ActivationKind.SILU
    # Of these two there is also a form written out in Python, which rounds elsewhere.
    if kind is ActivationKind.GELU and function.act is not nn.functional.gelu:
        return None
    if kind is ActivationKind.GELU_TANH and not isinstance(function.act, functools.partial):
        return None
    return None if kind is None else Activation(kind)
