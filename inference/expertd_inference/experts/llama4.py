"""Llama 4's experts, which are outside of transformers' experts seam.

Stock transformers multiplies the rows of a step by all experts: those that a row's router has not
chosen get zeros. And it scales what enters an expert by the router's score, where the seam scales
what leaves one. Here each row enters the experts that it has chosen, scaled, and leaves them as it
is: the seam's call, with a row for each choice and the weight 1.
"""

import sys
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations import moe

from expertd_inference.experts.call import has_seat, seat_of
from expertd_inference.experts.keeping import keep_fewer

_FILE = "transformers.models.llama4.modeling_llama4"


def adopt_llama4(model: nn.Module) -> None:
    """Lets the experts of ``model``, if it is a Llama 4, be replaced as those of the seam.

    Until they take a seat, its blocks compute as stock transformers.
    """
    llama4: Any = sys.modules.get(_FILE)
    blocks = () if llama4 is None else model.modules()
    for block in blocks:
        if type(block) is llama4.Llama4TextMoe:
            experts: Any = block.experts
            experts.has_gate = experts.is_transposed = experts.is_concatenated = True
            experts.has_bias = False
            experts._apply_gate = MethodType(moe._default_apply_gate, experts)
            block.forward = MethodType(_forward, block)


def _forward(block: Any, hidden_states: Tensor) -> tuple[Tensor, Tensor]:  # noqa: ANN401
    """As ``Llama4TextMoe.forward``: the output [T, H], and the router's logits [T, E]."""
    if not has_seat(block.experts):
        stock: tuple[Tensor, Tensor] = type(block).forward(block, hidden_states)
        return stock
    rows = hidden_states.reshape(-1, block.hidden_dim)
    scores, logits = block.router(rows)
    chosen = torch.topk(logits, block.top_k, dim=1).indices  # [T, k]
    weights = scores.gather(1, chosen)
    scaled = (rows[:, None] * weights[..., None]).flatten(0, 1)  # [T * k, H]
    seat = seat_of(block.experts)
    kept = keep_fewer(seat.call(rows, chosen, weights)).routed.index
    call = seat.call(scaled, kept.view(-1, 1), scaled.new_ones(len(scaled), 1))
    routed = seat.runner.run(call).view(*chosen.shape, -1)
    out: Tensor = block.shared_expert(rows)
    return out.add_(routed.sum(dim=1)), logits
