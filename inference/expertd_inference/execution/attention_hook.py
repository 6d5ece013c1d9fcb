"""The attention function that transformers' models call while they are ours.

transformers looks up ``config._attn_implementation`` among its registered functions, once for
attention and once for the mask. Ours asks who computes in this thread: a step of an executor, or
whoever looks at the model; without either it is what it stands for.
"""

import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any, Protocol

from torch import Tensor, nn
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, eager_mask, sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from expertd_inference.device.attention import without_cudnn_attention

_NAMES = {"sdpa": "expertd-sdpa", "eager": "expertd-eager"}
"""Ours for each; models whose own ``eager`` does more than ``sdpa`` can have that one."""


class AttentionBackend(Protocol):
    """Computes attention in the place of a model's own."""

    def attend(
        self,
        module: nn.Module,
        query: Tensor,  # [batch, heads, T, d_k]
        key: Tensor,  # [batch, kv_heads, length, d_k]
        value: Tensor,  # [batch, kv_heads, length, d_v]
        mask: Tensor | None,
        scaling: float | None,
        others: dict[str, Any],
    ) -> Tensor | None:
        """[batch, T, heads, d_v]; None if the model's own is to compute it."""

    def mask(self, make: Callable[..., Tensor | None], arguments: dict[str, Any]) -> Tensor | None:
        """The mask that the model's layers are given; ``make`` is what would make it."""


class _Here(threading.local):
    attention: AttentionBackend | None = None


_here = _Here()


@contextmanager
def attending(attention: AttentionBackend) -> Iterator[None]:
    """While models that are ours compute with ``attention`` in this thread."""
    before = _here.attention
    _here.attention = attention
    try:
        yield
    finally:
        _here.attention = before


def hook_attention(model: Any) -> bool:  # noqa: ANN401 - transformers is untyped
    """Lets ``model`` call ours; False if it has an implementation that ours does not stand for."""
    name = getattr(model.config, "_attn_implementation", None)
    if name in _NAMES:
        model.set_attn_implementation(_NAMES[name])
    return getattr(model.config, "_attn_implementation", None) in _NAMES.values()


def _sdpa(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,  # noqa: ANN401 - whatever the model has for other implementations
) -> tuple[Tensor, Tensor | None]:
    """torch's, outside of steps."""
    if (here := _here.attention) is not None:
        ours = here.attend(module, query, key, value, attention_mask, scaling, others)
        if ours is not None:
            return ours, None
    with without_cudnn_attention() if query.is_cuda else nullcontext():
        result: tuple[Tensor, Tensor | None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
        )
    return result


def _eager(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    **others: Any,  # noqa: ANN401
) -> tuple[Tensor, Tensor | None]:
    """The function that the model's own file has for it."""
    if (here := _here.attention) is not None:
        ours = here.attend(module, query, key, value, attention_mask, scaling, others)
        if ours is not None:
            return ours, None
    own: Any = sys.modules[type(module).__module__]
    result: tuple[Tensor, Tensor | None] = own.eager_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
    )
    return result


def _masks(make: Callable[..., Tensor | None]) -> Callable[..., Tensor | None]:
    def mask(**arguments: Any) -> Tensor | None:  # noqa: ANN401 - transformers'
        here = _here.attention
        return make(**arguments) if here is None else here.mask(make, arguments)

    return mask


def _register(
    name: str,
    attention: Callable[..., tuple[Tensor, Tensor | None]],
    mask: Callable[..., Tensor | None],
) -> None:
    ALL_ATTENTION_FUNCTIONS.register(name, attention)
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, _masks(mask))


_register(_NAMES["sdpa"], _sdpa, sdpa_mask)
_register(_NAMES["eager"], _eager, eager_mask)
