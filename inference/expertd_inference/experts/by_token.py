"""Layers whose experts follow from the tokens alone: known before the first layer computes.

So route DeepSeek V4's first layers, and models of word experts (Mixture of Word Experts, arXiv
2311.09179), where a token has experts of its own. What a text needs of them is known exactly when
it arrives.
"""

import threading
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class StepTokens:
    """The tokens that the model computes now, noted as they pass the routers of such layers."""

    def __init__(self) -> None:
        self._of_thread = threading.local()

    @property
    def ids(self) -> Tensor | None:
        """[T] of this thread's step; None before the first of these layers."""
        return getattr(self._of_thread, "ids", None)

    def watch(self, router: nn.Module) -> None:
        """Notes what ``router`` is called with from now on: hidden states, then tokens."""
        router.register_forward_pre_hook(self._note)

    def _note(self, router: nn.Module, arguments: tuple[Any, ...]) -> None:
        self._of_thread.ids = arguments[1].reshape(-1)


class TokenRouter:
    """One layer's experts by token; asked like :class:`~.routers.LayerRouter`, it knows."""

    def __init__(self, experts_of: Tensor, num_experts: int, step: StepTokens) -> None:
        """``experts_of`` [vocabulary, k] has each token's experts."""
        self.experts_of = experts_of
        self.num_experts = num_experts
        self._step = step

    def likeliest(self, hidden: Tensor, num: int) -> Tensor:  # [T, H] -> [num], int64
        """The experts that most of the step's tokens use, and no others."""
        counts = torch.bincount(self.chosen(hidden).flatten(), minlength=self.num_experts)
        num_used = int((counts > 0).sum())
        return torch.topk(counts, min(num, num_used)).indices

    def foreseen(self, hidden: Tensor) -> list[int]:  # [T, H]
        """All experts that the step's tokens use."""
        experts: list[int] = self.likeliest(hidden, self.num_experts).tolist()
        return experts

    def chosen(self, hidden: Tensor) -> Tensor:  # [T, H] -> [T, k], int64
        """The experts of each token of the step, whatever its hidden state is."""
        ids = self._step.ids
        if ids is None:
            return torch.zeros(0, self.experts_of.shape[1], dtype=torch.int64, device=hidden.device)
        return self.experts_of[ids.to(self.experts_of.device)].long().to(hidden.device)

    def of_text(self, tokens: Sequence[int]) -> list[int]:
        """The experts that a text uses, those of its first tokens first."""
        known = [token for token in tokens if 0 <= token < len(self.experts_of)]
        experts = self.experts_of[torch.tensor(known, dtype=torch.int64)].flatten().tolist()
        return list(dict.fromkeys(experts))


def find_token_routers(
    model: nn.Module, experts: Mapping[int, nn.Module]
) -> Mapping[int, TokenRouter]:
    """The layers of ``experts`` (modules of ``model``) whose experts follow from tokens."""
    layers = {id(module): layer for layer, module in experts.items()}
    step, routers = StepTokens(), {}
    for block in model.modules():
        router: Any = getattr(block, "gate", None)
        experts_of = getattr(router, "tid2eid", None)
        layer = layers.get(id(getattr(block, "experts", None)))
        if layer is not None and isinstance(experts_of, Tensor) and experts_of.dim() == 2:
            step.watch(router)
            routers[layer] = TokenRouter(experts_of, router.weight.shape[0], step)
    return routers
