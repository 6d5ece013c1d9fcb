"""What a model is built of, as far as a program can compute it: plain descriptions."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from expertd_inference.execution.recognize import FeedForwardSpec, LinearSpec, NormSpec, RouterSpec


class UnknownPartError(Exception):
    """The model has a part that no program has an operation for; the message says which."""


@dataclass(frozen=True, eq=False)
class RotationSpec:
    """Rotary embedding of the first ``turned`` elements of each head."""

    angles: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Positions [1, n], int64, to cosines and sines, [1, n, angles] both."""
    turned: int
    pairs: bool
    """Whether pairs that lie beside one another are turned, or else the two halves."""


@dataclass(frozen=True, eq=False)
class AttentionSpec:
    """Attention of heads that may share keys, each row to its own sequence."""

    query: LinearSpec
    key: LinearSpec
    value: LinearSpec
    output: LinearSpec
    query_norm: NormSpec | None
    key_norm: NormSpec | None
    """Of each head, or of all that a row has."""
    rotation: RotationSpec | None
    heads: int
    kv_heads: int
    key_width: int
    value_width: int
    scale: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None
    gate: LinearSpec | None = None
    """What enters the attention decides by its sigmoid how much of the result is kept."""


@dataclass(frozen=True, eq=False)
class MoeSpec:
    """Routed experts, with what is beside them for all rows."""

    router: RouterSpec
    module: nn.Module
    """The experts: see :mod:`expertd_inference.experts.call`."""
    shared: FeedForwardSpec | None
    shared_gate: LinearSpec | None
    """Its sigmoid, of one element, is what the shared expert's result is multiplied by."""


@dataclass(frozen=True, eq=False)
class LayerSpec:
    """``x + m * after(part(before(x)))``, first of the attention, and then of the feed-forward."""

    attention: AttentionSpec
    before_attention: NormSpec | None
    after_attention: NormSpec | None
    feed_forward: FeedForwardSpec | MoeSpec | nn.Module
    """A module is called as it is, for all rows as one sequence."""
    before_feed_forward: NormSpec | None
    after_feed_forward: NormSpec | None
    multiplier: float


@dataclass(frozen=True, eq=False)
class ModelSpec:
    """A decoder."""

    embedding: Tensor
    """[vocabulary, H]."""
    embedding_scale: float
    layers: tuple[LayerSpec, ...]
    norm: NormSpec
    head: LinearSpec
    logits_divisor: float
    model: Any
    """The transformers model, kept since all of this is of its memory."""
