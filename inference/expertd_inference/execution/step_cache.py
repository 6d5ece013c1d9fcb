"""The cache that a model is given for a step: recurrent states, and no keys or values.

Keys and values stay with attention (:mod:`.attention_hook`), so the layers here hand on what they
are given. Recurrent states are loaded before the step and read after it.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import (
    DynamicCache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)


class UnknownCacheError(Exception):
    """A layer keeps something that is neither keys and values nor a recurrent state."""


class StateName(NamedTuple):
    """Of a state among all of a model: ``kind`` is ``conv``, ``recurrent`` or ``linear``."""

    layer: int
    kind: str
    number: int


class _Passed(DynamicLayer):  # type: ignore[misc] # transformers is untyped
    """Attention's part of a layer."""

    is_sliding = False

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ANN401 - transformers'
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        return key_states, value_states

    def get_seq_length(self) -> int:
        return 0

    def get_query_offset(self) -> int:
        return 0

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length, 0


class _RecurrentAndPassed(LinearAttentionLayer, _Passed):  # type: ignore[misc]
    """Of a layer that has both."""

    def __init__(self, number_of_states: int = 1) -> None:
        _Passed.__init__(self)
        LinearAttentionLayer.__init__(self, number_of_states=number_of_states)

    def lazy_initialization(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401
        LinearAttentionLayer.lazy_initialization(self, *args, **kwargs)


class StepCache(DynamicCache):  # type: ignore[misc] # transformers is untyped
    """For one forward pass of a model with that ``config``.

    Raises UnknownCacheError if its layers keep something else.
    """

    layers: list[Any]

    def __init__(self, config: Any, states: Mapping[StateName, Tensor] | None = None) -> None:  # noqa: ANN401
        """``states`` [sequences, ...] go on from earlier rows; without, sequences begin."""
        super().__init__(config=config.get_text_config(decoder=True))
        self.layers = [_layer(layer) for layer in self.layers]
        self._linear: dict[int, Tensor] = {}
        for name, state in (states or {}).items():
            if name.kind == _LINEAR:
                self._linear[name.layer] = state
                continue
            layer = self.layers[name.layer]
            getattr(layer, f"{name.kind}_states")[name.number] = state
            getattr(layer, f"is_{name.kind}_states_initialized")[name.number] = True
            layer.has_previous_state[name.number] = True
            layer.dtype, layer.device = state.dtype, state.device
            if name.kind == _CONV:
                layer.conv_kernel_size[name.number] = state.shape[-1]

    def states(self) -> dict[StateName, Tensor]:
        """Those after the rows that were computed, each [sequences, ...]."""
        found = {
            StateName(number, kind, index): state
            for number, layer in enumerate(self.layers)
            if isinstance(layer, LinearAttentionLayer)
            for kind in (_CONV, _RECURRENT)
            for index, state in getattr(layer, f"{kind}_states").items()
            if state is not None
        }
        return found | {StateName(layer, _LINEAR, 0): x for layer, x in self._linear.items()}

    def get_linear_cache(self, layer_idx: int) -> Tensor | None:
        """As MiniMax asks its own cache for a state."""
        return self._linear.get(layer_idx)

    def set_linear_cache(self, layer_idx: int, linear_cache: Tensor) -> None:
        """As MiniMax gives its own cache a state."""
        self._linear[layer_idx] = linear_cache


_KEPT = (LinearAttentionLayer, getattr(cache_utils, "DummyLayer", None))
"""The second, of layers that keep nothing, is there since transformers 5.23."""

_CONV, _RECURRENT, _LINEAR = "conv", "recurrent", "linear"


def _layer(layer: Any) -> Any:  # noqa: ANN401 - transformers is untyped
    kind = type(layer)
    if kind in (DynamicLayer, DynamicSlidingWindowLayer):
        return _Passed()
    if kind in _KEPT:
        return layer
    if kind in (
        LinearAttentionAndFullAttentionLayer,
        LinearAttentionAndSlidingWindowAttentionLayer,
    ):
        return _RecurrentAndPassed(layer.number_of_states)
    raise UnknownCacheError(f"a {kind.__name__} keeps more than keys and values")
