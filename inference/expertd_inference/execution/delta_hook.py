"""Recurrent layers of the gated delta rule step on the memory of states itself.

A layer of these models calls a function of its file for the next row of each sequence. Each such
module of ours, and no class, gets a copy of its ``forward`` that calls :class:`_DeltaRule` instead.
Within a step of an executor a native kernel computes it; anywhere else transformers' function does.
"""

import inspect
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor

from expertd_inference.execution.step_cache import StateName
from expertd_inference.kernels.cpu.delta import Places, delta_step, fits
from expertd_inference.kv.state_memory import StateShape

_RULES = {"torch_recurrent_gated_delta_rule": False, "recurrent_kimi_delta_attention": True}
"""By name in a model's file: whether a decay is that of a key, or else of a head."""
_TOLERANCE = 0.02
"""Of the largest result; it is rounded to bfloat16."""


class _Here(threading.local):
    places: Places | None = None


_here = _Here()


@contextmanager
def stepping(places: Places | None) -> Iterator[None]:
    """While hooked layers in this thread take their state for the memory that has ``places``."""
    before = _here.places
    _here.places = places
    try:
        yield
    finally:
        _here.places = before


class _DeltaRule:
    """Stands for the function ``theirs`` of a model's file."""

    def __init__(self, theirs: Any) -> None:  # noqa: ANN401 - transformers is untyped
        self._theirs = theirs

    def __call__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        **others: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        if (places := _here.places) is None:
            return self._theirs(query, key, value, **others)
        rows = (part.squeeze(1) for part in (query, key, value, others["g"], others["beta"]))
        states = others["initial_state"]
        return delta_step(states, places, *rows).unsqueeze(1), states


def hook_delta(
    model: Any,  # noqa: ANN401 - transformers is untyped
    states: Mapping[StateName, StateShape],
) -> frozenset[StateName]:
    """Hooks the layers of ``model`` that are known; which of ``states`` they keep."""
    hooked, same = set(), dict[object, bool]()
    for module in model.modules():
        forward = inspect.unwrap(type(module).forward)
        name = next((each for each in _RULES if each in _names(forward)), None)
        state = StateName(getattr(module, "layer_idx", -1), "recurrent", 0)
        if name is None or state not in states or not isinstance(forward, FunctionType):
            continue
        shape, theirs = states[state], forward.__globals__[name]
        if shape.device.type != "cpu" or not fits(shape.shape, shape.dtype, model.dtype):
            continue
        form = theirs, shape
        if form not in same:
            same[form] = _is_the_rule(theirs, shape, model.dtype, by_key=_RULES[name])
        if same[form] and _hook(module, forward, name, theirs):
            hooked.add(state)
    return frozenset(hooked)


def _names(forward: Any) -> tuple[str, ...]:  # noqa: ANN401
    return getattr(getattr(forward, "__code__", None), "co_names", ())


def _hook(module: Any, forward: FunctionType, name: str, theirs: Any) -> bool:  # noqa: ANN401
    """False if somebody else has hooked it."""
    if (there := vars(module).get("forward")) is not None:
        return isinstance(getattr(there, "__globals__", {}).get(name), _DeltaRule)
    ours = FunctionType(
        forward.__code__,
        {**forward.__globals__, name: _DeltaRule(theirs)},
        forward.__name__,
        forward.__defaults__,
        forward.__closure__,
    )
    ours.__kwdefaults__ = forward.__kwdefaults__
    module.forward = MethodType(ours, module)
    return True


def _is_the_rule(theirs: Any, shape: StateShape, dtype: torch.dtype, *, by_key: bool) -> bool:  # noqa: ANN401
    """Whether a native step is what ``theirs`` gives for random rows."""
    heads, keys, values = shape.shape
    generator = torch.Generator().manual_seed(0)

    def random(*size: int) -> Tensor:
        return torch.randn(1, 1, heads, *size, generator=generator)

    state = random(keys, values)[0]
    query, key = (random(keys).to(dtype) for _ in range(2))
    value, beta = random(values).to(dtype), random().sigmoid().to(dtype)
    decay = -(random(keys) if by_key else random()).abs()
    known = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    rest = {"g": decay, "beta": beta, **known}
    expected = theirs(query, key, value, initial_state=state, **rest)
    memory = torch.cat([state, torch.empty_like(state)])
    with stepping(Places([0], [1])):
        out, _ = _DeltaRule(theirs)(query, key, value, initial_state=memory, **rest)
    pairs = zip((out, memory[1:]), expected, strict=True)
    return all(
        bool((ours.float() - other.float()).abs().max() <= _TOLERANCE * other.abs().max())
        for ours, other in pairs
    )
