"""Keys and values of the tokens so far, in memory that grows by doubling."""

from typing import Any

from torch import Tensor
from transformers.cache_utils import DynamicCache, DynamicLayer

MIN_TOKENS = 256
"""Room for so many tokens at least: a short answer then never moves what is there."""


class GrowingLayer(DynamicLayer):  # type: ignore[misc] # transformers is untyped
    """Keys and values of one layer, [batch, heads, tokens, d].

    transformers' own layer copies everything for every token. This one copies it when its
    room is used up, which it then doubles; ``keys`` and ``values`` are views of what is used.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:  # noqa: ANN401 - transformers'
        super().__init__(*args, **kwargs)
        self.keys: Any
        self.values: Any
        self._room: tuple[Tensor, Tensor] | None = None
        self._views: tuple[Tensor, Tensor] | None = None

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        *args: Any,  # noqa: ANN401 - transformers'
        **kwargs: Any,  # noqa: ANN401
    ) -> tuple[Tensor, Tensor]:
        """Appends the new tokens'; returns all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        # Whoever cropped, reordered or reset the layer has put other tensors there.
        ours = self._views is not None and self.keys is self._views[0]
        old_tokens = self.keys.shape[-2] if self.keys.numel() else 0
        tokens = old_tokens + key_states.shape[-2]
        room = self._room
        if room is None or not ours or tokens > room[0].shape[-2]:
            room = self._grow(key_states, value_states, old_tokens, tokens)
        room[0].narrow(2, old_tokens, key_states.shape[-2]).copy_(key_states)
        room[1].narrow(2, old_tokens, key_states.shape[-2]).copy_(value_states)
        self.show(tokens)
        return self.keys, self.values

    def reserve(self, tokens: int) -> tuple[Tensor, Tensor]:
        """Memory of keys and values with room for ``tokens``, and in it those that are there.

        There must be some. Who appends to it by himself says so by :meth:`show`.
        """
        room = self._room
        ours = self._views is not None and self.keys is self._views[0]
        if room is None or not ours or tokens > room[0].shape[-2]:
            room = self._grow(self.keys, self.values, self.keys.shape[-2], tokens)
            self.show(self.keys.shape[-2])
        return room

    def show(self, tokens: int) -> None:
        """Makes the first ``tokens`` of the memory those that are there."""
        assert self._room is not None
        self.keys, self.values = (part.narrow(2, 0, tokens) for part in self._room)
        self._views = self.keys, self.values

    def _grow(
        self, key_states: Tensor, value_states: Tensor, old_tokens: int, tokens: int
    ) -> tuple[Tensor, Tensor]:
        """Memory with room for twice ``tokens``, with the old ones in it."""
        made = []
        for old, new in ((self.keys, key_states), (self.values, value_states)):
            batch, heads, _, d = new.shape
            room = new.new_empty(batch, heads, max(2 * tokens, MIN_TOKENS), d)
            if old_tokens:
                room.narrow(2, 0, old_tokens).copy_(old)
            made.append(room)
        self._room = made[0], made[1]
        return self._room


def growing(cache: DynamicCache) -> None:
    """Lets the layers of an empty ``cache`` grow by doubling, but for those with a window."""
    cache.layers = [
        GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers
    ]
    if getattr(cache, "layer_class_to_replicate", None) is DynamicLayer:
        cache.layer_class_to_replicate = GrowingLayer
