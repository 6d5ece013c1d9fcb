"""Stock Mixtral at a size that two CPU cores train in an hour, and what makes its steps fast.

The model is transformers' own class, so the result loads without any of this code. Its attention
and its experts are replaced through transformers' registries during training only: they compute
the same function with one matmul per expert and no mask tensor, about twice as fast on a CPU.
"""

# ruff: noqa: ANN401 - what autograd and transformers hand to these functions has no type
# mypy: disable-error-code="no-untyped-call"

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from corpus import SEPARATOR_ID, VOCAB_SIZE
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from transformers import MixtralConfig, MixtralForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.mixtral.modeling_mixtral import MixtralRMSNorm

TRAINING_IMPLEMENTATION = "tiny_mixtral"
NUM_EXPERTS = 8
TOP_K = 2
QUERY_BLOCK = 128  # rows of scores at a time: they stay in the cache, and half of them are skipped
LOGIT_ROWS = 256  # positions whose logits exist at one time: 4 MiB of fp32


def build_model(context: int, balance_weight: float) -> MixtralForCausalLM:
    """A freshly initialised model: 16.4 M parameters, every dimension a multiple of 128."""
    config = MixtralConfig(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=384,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        max_position_embeddings=context,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        router_aux_loss_coef=balance_weight,
        sliding_window=None,
        bos_token_id=SEPARATOR_ID,
        eos_token_id=SEPARATOR_ID,
        pad_token_id=None,
    )
    return MixtralForCausalLM(config)


def use_training_kernels(model: MixtralForCausalLM) -> None:
    """Switch the model to this file's attention and experts."""
    ALL_ATTENTION_FUNCTIONS.register(TRAINING_IMPLEMENTATION, _attention_forward)
    ALL_EXPERTS_FUNCTIONS.register(TRAINING_IMPLEMENTATION, _experts_forward)
    model.config._attn_implementation = TRAINING_IMPLEMENTATION
    model.config._experts_implementation = TRAINING_IMPLEMENTATION
    for module in model.modules():
        if isinstance(module, MixtralRMSNorm):
            module.forward = MethodType(_norm_forward, module)
    rotary = model.model.rotary_emb
    rotary.register_forward_hook(lambda *call: tuple(part.bfloat16() for part in call[2]))


# --- experts --------------------------------------------------------------------------------------


def _experts_forward(
    self: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """Sort the (token, slot) pairs by expert, run each expert once, scatter the weighted rows back.

    hidden_states (tokens, hidden), top_k_index and top_k_weights (tokens, k); returns like
    hidden_states.
    """
    k = top_k_index.shape[1]
    expert_of_pair = top_k_index.reshape(-1)
    order = expert_of_pair.argsort(stable=True)
    counts = expert_of_pair.bincount(minlength=self.num_experts).tolist()
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    rows = _Permute.apply(hidden_states.bfloat16(), order, back, k)
    # unbind and not indexing: its backward stacks the gradients instead of adding zero-filled ones
    gate_ups, downs = self.gate_up_proj.bfloat16().unbind(), self.down_proj.bfloat16().unbind()
    outputs = []
    for chunk, gate_up, down in zip(rows.split(counts), gate_ups, downs, strict=True):
        gate, up = linear(chunk, gate_up).chunk(2, dim=-1)
        outputs.append(linear(silu(gate) * up, down))
    pairs = _Unpermute.apply(torch.cat(outputs), order, back)
    weighted = pairs.view(-1, k, hidden_states.shape[1]) * top_k_weights.unsqueeze(-1).bfloat16()
    summed: Tensor = weighted.sum(dim=1)
    return summed


class _Permute(torch.autograd.Function):
    """Rows of tokens in expert order. The backward gathers too, since index_add is slow on CPUs."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, order: Tensor, back: Tensor, k: int) -> Tensor:
        ctx.save_for_backward(back)
        ctx.k = k
        return hidden.index_select(0, order // k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (back,) = ctx.saved_tensors
        grad = grad.index_select(0, back)
        return grad.view(-1, ctx.k, grad.shape[1]).sum(dim=1), None, None, None


class _Unpermute(torch.autograd.Function):
    """Undo the sort: row ``back[i]`` goes to ``i``."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, order: Tensor, back: Tensor) -> Tensor:
        ctx.save_for_backward(order)
        return rows.index_select(0, back)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        (order,) = ctx.saved_tensors
        return grad.index_select(0, order), None, None


# --- attention ------------------------------------------------------------------------------------


def _attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention over whole rows without padding; (batch, heads, length, head_dim)."""
    groups = query.shape[1] // key.shape[1]
    key = key.repeat_interleave(groups, dim=1)
    value = value.repeat_interleave(groups, dim=1)
    out = _CausalAttention.apply((query * scaling).bfloat16(), key.bfloat16(), value.bfloat16())
    return out.transpose(1, 2).contiguous(), None


class _CausalAttention(torch.autograd.Function):
    """softmax(q kᵀ) v in blocks of queries, each against the keys up to its own end."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        blocks, probabilities = [], []
        for start in range(0, query.shape[2], QUERY_BLOCK):
            end = min(start + QUERY_BLOCK, query.shape[2])
            scores = query[:, :, start:end] @ key[:, :, :end].transpose(2, 3)
            future = torch.ones(end - start, end - start, dtype=torch.bool).triu_(1)
            scores[:, :, :, start:].masked_fill_(future, float("-inf"))
            probability = torch.softmax(scores, dim=-1)  # bf16 in and out, fp32 inside
            probabilities.append(probability)
            blocks.append(probability @ value[:, :, :end])
        ctx.save_for_backward(query, key, value, *probabilities)
        return torch.cat(blocks, dim=2)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        query, key, value, *probabilities = ctx.saved_tensors
        grad_query = torch.empty_like(query)
        grad_key, grad_value = torch.zeros_like(key), torch.zeros_like(value)
        start = 0
        for probability in probabilities:
            end = start + probability.shape[2]
            out = grad[:, :, start:end]
            grad_value[:, :, :end] += probability.transpose(2, 3) @ out
            of_probability = out @ value[:, :, :end].transpose(2, 3)
            of_scores = torch._softmax_backward_data(
                of_probability, probability, -1, probability.dtype
            )
            grad_query[:, :, start:end] = of_scores @ key[:, :, :end]
            grad_key[:, :, :end] += of_scores.transpose(2, 3) @ query[:, :, start:end]
            start = end
        return grad_query, grad_key, grad_value


# --- norms ----------------------------------------------------------------------------------------


def _norm_forward(self: Any, hidden_states: Tensor) -> Tensor:
    """RMS norm of the fp32 residual stream, as the bf16 that every matmul after it wants."""
    out: Tensor = _RMSNorm.apply(hidden_states.float(), self.weight, self.variance_epsilon)
    return out


class _RMSNorm(torch.autograd.Function):
    """Half as many passes over memory as autograd makes of the formula."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        square = torch.linalg.vector_norm(hidden, dim=-1, keepdim=True).square_()
        scale = square.div_(hidden.shape[-1]).add_(epsilon).rsqrt_()
        normed = hidden * scale
        ctx.save_for_backward(normed, scale, weight)
        return torch.mul(normed, weight, out=torch.empty_like(hidden, dtype=torch.bfloat16))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        normed, scale, weight = ctx.saved_tensors
        product = grad * normed
        grad_weight = product.flatten(0, -2).sum(dim=0)
        mean = product @ (weight / len(weight))
        grad_hidden = (grad * weight).addcmul_(normed, mean.unsqueeze(-1), value=-1).mul_(scale)
        return grad_hidden, grad_weight, None


# --- losses ---------------------------------------------------------------------------------------


class _FusedCrossEntropy(torch.autograd.Function):
    """Mean cross entropy of ``hidden @ weightᵀ``, gradients taken while the logits are at hand.

    No more than LOGIT_ROWS rows of logits exist at a time, and each softmax is computed once.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        low, grad_weight = weight.bfloat16(), torch.zeros_like(weight)
        grads, total = [], 0.0
        for rows, wanted in zip(
            hidden.bfloat16().split(LOGIT_ROWS), targets.split(LOGIT_ROWS), strict=True
        ):
            logits = linear(rows, low).float()
            logits -= logits.amax(dim=-1, keepdim=True)
            at_target = logits.gather(1, wanted[:, None])
            sums = logits.exp_().sum(dim=-1, keepdim=True)
            total += float((sums.log() - at_target).sum())
            grad = logits.div_(sums * len(targets))
            grad.scatter_add_(1, wanted[:, None], torch.full_like(at_target, -1 / len(targets)))
            low_grad = grad.bfloat16()
            grads.append(low_grad @ low)
            grad_weight += low_grad.t() @ rows
        ctx.save_for_backward(torch.cat(grads).to(hidden.dtype), grad_weight)
        return hidden.new_tensor(total / len(targets), dtype=torch.float32)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        grad_hidden, grad_weight = ctx.saved_tensors
        return grad_hidden * grad, grad_weight * grad, None


def language_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """Mean cross entropy per token; hidden (..., hidden), weight (vocab, hidden), targets (...)."""
    loss: Tensor = _FusedCrossEntropy.apply(
        hidden.reshape(-1, hidden.shape[-1]), weight, targets.reshape(-1)
    )
    return loss


def balance_losses(router_logits: tuple[Tensor, ...]) -> Tensor:
    """The Switch loss of every layer: 1 if balanced, NUM_EXPERTS / TOP_K if only two are used.

    transformers' ``load_balancing_loss_func`` adds all layers' counts before it multiplies, so it
    is content when layer 0 uses only the first experts and layer 1 only the last ones.
    """
    losses = []
    for logits in router_logits:
        probabilities = logits.float().softmax(dim=-1)
        chosen = probabilities.topk(TOP_K, dim=-1).indices.reshape(-1)
        share = chosen.bincount(minlength=NUM_EXPERTS).float() / len(chosen)
        losses.append(NUM_EXPERTS * (share * probabilities.mean(dim=0)).sum())
    return torch.stack(losses)
