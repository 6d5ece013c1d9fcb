"""What the layers of a model keep of a sequence, found out by watching it compute a few tokens.

An architecture is served in batches if all that its layers keep are keys and values of causal
attention, whole or windowed, and recurrent states. What they are called is nowhere written down
alike, but every model calls attention and its cache alike: so these are asked.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from expertd_inference.execution.attention_hook import attending, hook_attention
from expertd_inference.execution.delta_hook import hook_delta
from expertd_inference.execution.step_cache import StateName, StepCache, UnknownCacheError
from expertd_inference.kv.memory import KvLayer
from expertd_inference.kv.state_memory import StateShape
from expertd_inference.model.cache_name import CACHE
from expertd_inference.model.pack_config import rope_kinds, turning_points

PROBE_TOKENS = 7

_MEANINGLESS = frozenset(
    {"position_ids", "use_cache", "return_dict", "is_causal", "sliding_window", "s_aux", "softcap"}
)
"""Arguments of attention beside ``output_...``: some are used, the others change nothing here."""


class CannotBatchError(Exception):
    """Rows of several sequences cannot be computed together; the message is the reason."""


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """``number`` is that of its keys and values, ``window`` how many tokens a row sees at most.

    A layer that does not ``append`` reads those of another one.
    """

    number: int
    window: int | None
    appends: bool


@dataclass(frozen=True)
class ModelLayers:
    """By the module that calls attention; ``keys`` are those layers that append.

    A text of more than ``turning_point`` tokens has other keys from its first token on; None where
    keys are the same however long a text becomes.
    """

    attention: Mapping[nn.Module, AttentionLayer]
    keys: tuple[KvLayer, ...]
    states: Mapping[StateName, StateShape]
    turning_point: int | None = None
    in_place: frozenset[StateName] = frozenset()
    """Of the states those that layers change where they lie (:mod:`.delta_hook`)."""


@torch.no_grad()
def watch_layers(model: Any) -> ModelLayers:  # noqa: ANN401 - transformers is untyped
    """Lets ``model`` compute a few tokens. Raises CannotBatchError."""
    text = model.config.get_text_config()
    points = turning_points(text)
    if len(points) > 1 or any(kind.get("rope_type") == "dynamic" for kind in rope_kinds(text)):
        raise CannotBatchError("the angles of its positions depend on how long a text is")
    if getattr(text, "attention_chunk_size", None):
        raise CannotBatchError("its attention sees chunks")
    if len({parameter.device for parameter in model.parameters()}) > 1:
        raise CannotBatchError("its layers lie on several devices")
    if not hook_attention(model):
        raise CannotBatchError("its attention cannot be replaced")
    watched = _Watched(longest_text(model.config))
    try:
        cache = StepCache(model.config)
    except UnknownCacheError as error:
        raise CannotBatchError(str(error)) from error
    with attending(watched):
        model(
            input_ids=torch.arange(PROBE_TOKENS, device=model.device)[None],
            **{CACHE: cache},
            use_cache=False,
            # As in a step: a number would let Gemma 4 cut its masks for layers that share keys.
            logits_to_keep=torch.zeros(1, dtype=torch.int64, device=model.device),
        )
    if not watched.layers:
        raise CannotBatchError("it calls attention in a way of its own")
    states = {
        name: StateShape(tuple(state.shape[1:]), state.dtype, state.device)
        for name, state in cache.states().items()
    }
    if states and points:
        raise CannotBatchError("its states depend on how long a text becomes")
    return ModelLayers(
        watched.layers,
        tuple(watched.keys),
        states,
        turning_point=points[0] if points else None,
        in_place=hook_delta(model, states),
    )


def longest_text(config: Any) -> int:  # noqa: ANN401 - transformers is untyped
    """Of the tokens that masks are looked at for."""
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or 4096
    return min(int(longest), 1 << 18)


@dataclass
class _Watched:
    """Notes each call of attention."""

    longest: int
    layers: dict[nn.Module, AttentionLayer] = field(default_factory=dict)
    keys: list[KvLayer] = field(default_factory=list)
    _seen: list[Tensor] = field(default_factory=list)
    _masks: list[tuple[Tensor, int | None]] = field(default_factory=list)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        scaling: float | None,
        others: dict[str, Any],
    ) -> None:
        """Notes the layer, and leaves attention to the model."""
        _check_arguments(others)
        tokens = query.shape[2]
        if query.shape[0] != 1 or tokens != PROBE_TOKENS or key.shape[2] != tokens:
            raise CannotBatchError("its keys are not one for each token")
        if module in self.layers:
            raise CannotBatchError("a layer attends more than once")
        windows = [window for made, window in self._masks if made is mask]
        window = windows[0] if windows else others.get("sliding_window")
        if mask is not None and not windows:
            raise CannotBatchError("it makes masks of its own")
        shared = [number for number, seen in enumerate(self._seen) if seen is key]
        number = shared[0] if shared else len(self.keys)
        if not shared:
            self._seen.append(key)
            self.keys.append(KvLayer(key.shape[1], key.shape[3], value.shape[3], key.device))
        self.layers[module] = AttentionLayer(number, window, appends=not shared)

    def mask(self, make: Callable[..., Tensor | None], arguments: dict[str, Any]) -> Tensor | None:
        """Makes it in any case, so that a layer's can be told from another's."""
        window = _window_of(arguments["mask_function"], self.longest, arguments["device"])
        made = make(**arguments | {"allow_is_causal_skip": False})
        if made is not None:
            self._masks.append((made, window))
        return made


def _check_arguments(others: Mapping[str, Any]) -> None:
    for name, value in others.items():
        if value is None or value is False or name in _MEANINGLESS or name.startswith("output_"):
            continue
        raise CannotBatchError(f"its attention asks for {name.replace('_', ' ')}")


def _window_of(
    mask_function: Callable[[Tensor, Tensor, Tensor, Tensor], Tensor],
    longest: int,
    device: torch.device,
) -> int | None:
    """How many tokens each row sees by the mask, itself among them; None if all before it."""
    none = torch.zeros((), dtype=torch.int64, device=device)
    columns = torch.arange(longest, device=device)

    def visible(row: int) -> Tensor:
        return mask_function(none, none, none + row, columns).to(torch.bool).expand(longest)

    window = int(visible(longest - 1).sum())
    for row in {0, window - 1, window, window + 1, longest // 2, longest - 1}:
        if 0 <= row < longest and not torch.equal(
            visible(row), (columns <= row) & (columns > row - window)
        ):
            raise CannotBatchError("its attention is neither causal nor a window")
    return window if window < longest else None
