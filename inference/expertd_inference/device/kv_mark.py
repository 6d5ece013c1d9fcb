"""How far a KV cache was filled before a step, to undo the step.

transformers' own ``crop`` means another thing from release to release, and cannot undo a step of
a sliding window. Layers that grow at their end are cut; of others, which are bounded by their
window, the state of before is kept.
"""

from typing import Any

from torch import Tensor


class KvMark:
    """The state of a transformers ``Cache``, or of none."""

    def __init__(self, cache: Any) -> None:  # noqa: ANN401 - transformers is untyped
        self._cache = cache
        # One that goes back by itself keeps the addresses that recorded steps know. It counts a
        # step's tokens before the step's end, which may still fail, so the count is noted here.
        self._rewind = getattr(cache, "rewind", None)
        self._num_tokens: int = getattr(cache, "num_tokens", 0)
        layers = () if self._rewind else getattr(cache, "layers", ())
        self._layers = [_LayerMark(layer) for layer in layers]

    @property
    def can_restore(self) -> bool:
        """Whether :meth:`restore` knows how to."""
        return self._cache is None or hasattr(self._cache, "layers")

    def restore(self) -> None:
        """Goes back to it."""
        if self._rewind is not None:
            self._rewind(self._num_tokens)
            return
        if self._cache is None:
            return
        # Layers that a cache adds as it meets them.
        del self._cache.layers[len(self._layers) :]
        for mark in self._layers:
            mark.restore()


class _LayerMark:
    def __init__(self, layer: Any) -> None:  # noqa: ANN401
        self._layer = layer
        keys = getattr(layer, "keys", None)
        grows = isinstance(keys, Tensor) and type(layer).__name__ == "DynamicLayer"
        self._length = keys.shape[-2] if grows and isinstance(keys, Tensor) else None
        # What is added to in place, such as a length on a device, has to be copied.
        self._state = {} if grows else {name: _kept(value) for name, value in vars(layer).items()}

    def restore(self) -> None:
        if self._length is None:
            for name, value in self._state.items():
                now = getattr(self._layer, name)
                if _is_number(value) and _is_number(now):
                    # In place: what was recorded knows its address.
                    now.copy_(value)
                else:
                    setattr(self._layer, name, value)
        else:
            self._layer.keys = self._layer.keys[..., : self._length, :]
            self._layer.values = self._layer.values[..., : self._length, :]


def _kept(value: object) -> object:
    return value.clone() if isinstance(value, Tensor) and _is_number(value) else value


def _is_number(value: object) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1
