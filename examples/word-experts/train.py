"""Trains a small model of word experts, in minutes, and writes it as a checkpoint.

Mixture of Word Experts (arXiv 2311.09179): each token of the vocabulary has an expert of its own
in each layer, so that most of the model is a memory of which a token reads a four-thousandth. Here
it is DeepSeek V4 with nothing but hash-routed layers, which transformers knows: 4 layers of 4,096
experts, 16,384 in all, one of them a token and layer. Text and tokenizer are tiny-mixtral's.

With ``--experts 1`` all tokens share one expert of that size: the same computing, no memory.

python examples/word-experts/train.py /tmp/word-experts --minutes 4
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers import AutoModelForCausalLM, DeepseekV4Config, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tiny-mixtral"))
import corpus

LAYERS, HIDDEN, INTERMEDIATE, CONTEXT = 4, 64, 8, 128
ROWS = 8


def build_model(num_experts: int) -> Any:  # noqa: ANN401 - transformers is untyped
    """On the CPU, its weights drawn; token t has expert ``t % num_experts`` of each layer."""
    config = DeepseekV4Config(
        vocab_size=corpus.VOCAB_SIZE,
        hidden_size=HIDDEN,
        moe_intermediate_size=INTERMEDIATE,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=32,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=32,
        num_experts_per_tok=1,
        n_routed_experts=num_experts,
        max_position_embeddings=4 * CONTEXT,
        layer_types=["sliding_attention"] * LAYERS,
        mlp_layer_types=["hash_moe"] * LAYERS,
        hc_mult=2,
        hc_sinkhorn_iters=3,
        index_n_heads=2,
        index_head_dim=16,
        index_topk=16,
        bos_token_id=corpus.SEPARATOR_ID,
        eos_token_id=corpus.SEPARATOR_ID,
    )
    # Gathers each token's expert: a loop over thousands would take seconds a step.
    model = AutoModelForCausalLM.from_config(config, experts_implementation="batched_mm")
    for layer in model.model.layers:
        tokens = torch.arange(corpus.VOCAB_SIZE)[:, None]
        layer.mlp.gate.tid2eid.copy_(tokens % num_experts)
    return model


def loss_of(model: Any, batch: Tensor) -> Tensor:  # noqa: ANN401
    """Nats per token of [rows, CONTEXT + 1] tokens."""
    logits = model(batch[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())


def train(model: Any, tokens: Tensor, minutes: float, seed: int = 0) -> int:  # noqa: ANN401
    """Adam for so long; the number of steps."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.98))
    began, steps = time.monotonic(), 0
    while (spent := (time.monotonic() - began) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = 1e-2 * min(1.0, (steps + 1) / 20) * (1 - spent)
        starts = torch.randint(len(tokens) - CONTEXT - 1, (ROWS,), generator=generator)
        loss = loss_of(model, tokens[starts[:, None] + torch.arange(CONTEXT + 1)])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        steps += 1
        if steps % 50 == 0:
            print(f"step {steps}: {loss.item():.3f}", flush=True)
    return steps


@torch.no_grad()
def evaluate(model: Any, tokens: Tensor) -> float:  # noqa: ANN401
    """Nats per token of text that training has not seen."""
    windows = tokens[: len(tokens) // (CONTEXT + 1) * (CONTEXT + 1)].view(-1, CONTEXT + 1)[:96]
    return sum(loss_of(model, window[None]).item() for window in windows) / len(windows)


def main() -> None:
    """Trains, evaluates, and writes the checkpoint."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--minutes", type=float, default=4)
    parser.add_argument("--experts", type=int, default=corpus.VOCAB_SIZE)
    arguments = parser.parse_args()
    tokenizer = corpus.load_tokenizer()
    modules = [module.text for module in corpus.read_split().train if not module.is_test]
    tokens = torch.from_numpy(corpus.encode_modules(tokenizer, modules).astype("int64"))
    unseen = corpus.encode_modules(tokenizer, corpus.read_heldout()).astype("int64")
    model = build_model(arguments.experts)
    steps = train(model, tokens, arguments.minutes)
    model.eval()
    report = {
        "experts": arguments.experts * LAYERS,
        "weights": sum(parameter.numel() for parameter in model.parameters()),
        "steps": steps,
        "tokens": steps * ROWS * CONTEXT,
        "nats_per_token": round(evaluate(model, torch.from_numpy(unseen)), 3),
    }
    print(json.dumps(report))
    model.bfloat16().save_pretrained(arguments.out)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=corpus.SEPARATOR, eos_token=corpus.SEPARATOR
    ).save_pretrained(arguments.out)
    (arguments.out / "training.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
