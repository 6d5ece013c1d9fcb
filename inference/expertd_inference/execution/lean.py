"""Makes a decoding step of a transformers model cheap, without a copy of its code.

A token passes some sixty small operations per layer, and in torch each costs more than its
arithmetic. Norms, routers and attention are replaced by one native call each (``kernels.cpu.step``)
where that computes the same. Whether it does is tried, not looked up: a module's class is
replaced only if its own ``forward`` and ours agree on random input. So what an architecture
does differently stays as it is, and is merely slower.

What is replaced takes the short way only for few tokens on a CPU, and else calls what it
replaces.
"""

from inspect import signature
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from expertd_inference.execution.attention_hook import hook_attention
from expertd_inference.execution.lean_linear import call_directly, lean_linear
from expertd_inference.kernels.cpu.step import DTYPES, StepKernels, describe

KERNELS = "_expertd_step_kernels"
"""The attribute of a lean model that holds what it was made lean with."""

MAX_ROWS = 64
"""Up to so many rows an operation takes less time than waking a second thread."""
LEAN_ROWS = "expertd_max_rows"
"""The attribute of a lean norm that holds up to how many rows it is one call."""

_TRIAL_ROWS = 8
_MAX_DIFFERING = 0.02
"""Share of results that may be rounded to a neighbour, where the sums' order decides it."""


def make_lean(model: Any, kernels: StepKernels) -> None:  # noqa: ANN401 - transformers is untyped
    """Replaces what can be replaced in ``model``; whatever cannot stays as it is."""
    classes: dict[type, type | None] = {}
    for module in model.modules():
        kind = type(module)
        if kind not in classes:
            classes[kind] = (
                _lean_norm(module, kernels)
                or _lean_router(module, kernels)
                or lean_linear(module, kernels)
                or _lean_attention(kind, kernels)
            )
        if (lean := classes[kind]) is not None:
            module.__class__ = lean
    hook_attention(model)
    model.__dict__[KERNELS] = kernels


def _lean_norm(module: Any, kernels: StepKernels) -> type | None:  # noqa: ANN401 - untyped
    """A class that is ``module``'s with a shorter way, or None if that is not the same."""
    weight, eps = getattr(module, "weight", None), getattr(module, "variance_epsilon", None)
    if not isinstance(weight, Tensor) or weight.dim() != 1 or not isinstance(eps, float):
        return None
    if weight.device.type != "cpu" or weight.dtype not in DTYPES:
        return None
    kind = type(module)
    if len(signature(kind.forward).parameters) != 2:
        return None  # It takes more than hidden states, such as a gate.
    x = _noise(_TRIAL_ROWS, len(weight)).to(weight.dtype)
    with torch.no_grad():
        # Weights of one would not tell the orders of rounding apart.
        trial = _with_weight(module, 1 + _noise(len(weight)))
        expected = kind.forward(trial, x)
        for round_first in (True, False):
            result = kernels.rms_norm(x, trial.weight, eps, round_first=round_first)
            if _agree(result, expected):
                return _norm_class(kind, kernels, round_first=round_first)
    return None


def _norm_class(kind: Any, kernels: StepKernels, *, round_first: bool) -> type:  # noqa: ANN401
    rms_norm = kernels.rms_norm

    class LeanNorm(kind):  # type: ignore[misc] # of a class that is known at run time
        """An RMSNorm in one call."""

        __call__ = call_directly
        expertd_round_first = round_first
        expertd_max_rows = MAX_ROWS

        def forward(self, hidden_states: Tensor) -> Tensor:
            weight = self._parameters["weight"]  # nn.Module's way to it costs more than the rest
            if (
                hidden_states.dtype is weight.dtype
                and hidden_states.numel() <= self.expertd_max_rows * weight.numel()
                and hidden_states.is_contiguous()
                and hidden_states.is_cpu
            ):
                return rms_norm(
                    hidden_states, weight, self.variance_epsilon, round_first=round_first
                )
            result: Tensor = super().forward(hidden_states)
            return result

    return _named(LeanNorm, kind)


def _lean_router(module: Any, kernels: StepKernels) -> type | None:  # noqa: ANN401 - untyped
    """As :func:`_lean_norm`, for a softmax over all experts of which the likeliest are chosen."""
    weight, k = getattr(module, "weight", None), getattr(module, "top_k", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2 or not isinstance(k, int):
        return None
    if weight.device.type != "cpu" or weight.dtype not in DTYPES or k > len(weight):
        return None
    kind = type(module)
    x = _noise(_TRIAL_ROWS, weight.shape[1]).to(weight.dtype)
    with torch.no_grad():
        trial = _with_weight(module, _noise(*weight.shape).div(weight.shape[1] ** 0.5))
        try:
            logits, weights, index = kind.forward(trial, x)
        except (TypeError, ValueError):
            return None  # It asks for more than hidden states, or answers otherwise.
        if not torch.equal(logits, functional.linear(x, trial.weight)):
            return None
        if not weight.is_contiguous():
            return None
        float_weights = weights.dtype == torch.float32
        if not float_weights and weights.dtype != logits.dtype:
            return None
        for normalize in (True, False):
            ours, chosen = kernels.route(
                logits, k, normalize=normalize, float_weights=float_weights
            )
            if torch.equal(chosen, index) and _agree(ours, weights):
                return _router_class(
                    kind, kernels, normalize=normalize, float_weights=float_weights
                )
    return None


def _router_class(
    kind: Any,  # noqa: ANN401 - known at run time
    kernels: StepKernels,
    *,
    normalize: bool,
    float_weights: bool,
) -> type:
    route = kernels.route

    class LeanRouter(kind):  # type: ignore[misc] # of a class that is known at run time
        """Logits in one call, and softmax and top k in another."""

        expertd_normalize = normalize
        expertd_float_weights = float_weights

        def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor]:
            weight = self._parameters["weight"]
            if (
                hidden_states.dtype is weight.dtype
                and kernels.takes(hidden_states.numel() // weight.shape[1], weight)
                and hidden_states.is_cpu
            ):
                described = self.__dict__.get("_described")
                if described is None or described.weight != weight.data_ptr():
                    described = self.__dict__["_described"] = describe(weight)
                rows = hidden_states.reshape(-1, weight.shape[1]).contiguous()
                logits = kernels.linear(rows, weight, described)
                weights, index = route(
                    logits, self.top_k, normalize=normalize, float_weights=float_weights
                )
                return logits, weights, index
            result: tuple[Tensor, Tensor, Tensor] = super().forward(hidden_states)
            return result

    return _named(LeanRouter, kind)


def _lean_attention(kind: Any, kernels: StepKernels) -> type | None:  # noqa: ANN401
    """A class whose ``forward`` is a copy of ``kind``'s, but for a rotation in one native call.

    None if it does not rotate as most models do.
    """
    forward = kind.forward
    name = "apply_rotary_pos_emb"
    if type(forward) is not FunctionType or name not in forward.__code__.co_names:
        return None
    theirs: Any = forward.__globals__[name]
    for dtype in DTYPES:
        query, key, cos, sin = (
            _noise(1, heads, 1, 32).to(dtype) * (seed + 1)
            for seed, heads in enumerate((6, 2, 1, 1))
        )
        try:
            expected = theirs(query, key, cos[0], sin[0])
        except (TypeError, ValueError, IndexError, RuntimeError):
            return None  # It is called with something else.
        if not isinstance(expected, tuple) or len(expected) != 2:
            return None
        ours = kernels.rotate(query, key, cos[0], sin[0])
        if not all(torch.equal(*pair) for pair in zip(ours, expected, strict=True)):
            return None
    copied = FunctionType(
        forward.__code__,
        forward.__globals__ | {name: _rotation(theirs, kernels)},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    copied.__kwdefaults__ = forward.__kwdefaults__
    # Under its own name, by which it is known to whoever is told about it; and of its own file,
    # where the hook of attention finds what the model's own is.
    members = {"forward": copied, "expertd_rotates": True, "__module__": kind.__module__}
    return type(kind.__name__, (kind,), members)


def _rotation(theirs: Any, kernels: StepKernels) -> Any:  # noqa: ANN401 - functions of tensors
    """``theirs``, but for one token of one sequence."""

    def rotate(*given: Any, **named: Any) -> Any:  # noqa: ANN401 - whatever theirs takes
        if len(given) == 4 and not named and _is_one_token(*given):
            return kernels.rotate(*given)
        return theirs(*given, **named)

    return rotate


def _is_one_token(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> bool:
    return (
        q.dim() == 4
        # Whoever notes torch's operations, to do them again, would not see ours.
        and not torch._C._len_torch_dispatch_stack()
        and not (q.requires_grad or k.requires_grad)
        and type(q) is type(k) is Tensor
        and not torch.compiler.is_compiling()
        and q.shape[0] == q.shape[2] == 1
        and q.is_cpu
        and q.dtype is k.dtype is cos.dtype is sin.dtype
        and q.dtype in DTYPES
        and cos.numel() == sin.numel() == q.shape[3] == k.shape[3]
        and q.stride(3) == k.stride(3) == 1
        and cos.is_contiguous()
        and sin.is_contiguous()
    )


def _with_weight(module: Any, weight: Tensor) -> Any:  # noqa: ANN401 - untyped
    """``module`` with another weight; its other parts are shared."""
    trial = object.__new__(type(module))
    trial.__dict__ = {**module.__dict__, "_parameters": dict(module._parameters)}
    trial._parameters["weight"] = nn.Parameter(weight.to(module.weight.dtype), requires_grad=False)
    return trial


def _noise(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    if ours.dtype != theirs.dtype or ours.shape != theirs.shape:
        return False
    epsilon = torch.finfo(ours.dtype).eps
    if not torch.allclose(ours.float(), theirs.float(), rtol=max(2 * epsilon, 1e-5), atol=1e-6):
        return False
    differing = (ours != theirs).float().mean().item()
    return ours.dtype == torch.float32 or differing <= _MAX_DIFFERING


def _named(lean: type, kind: type) -> type:
    lean.__name__ = lean.__qualname__ = f"Lean{kind.__name__}"
    return lean
