"""Greedy generation, the same call for stock models and ours."""

from typing import Any

import torch


def greedy(model: Any, prompt: list[int], max_new_tokens: int) -> list[int]:
    """The new tokens; generation does not stop at the end-of-text token."""
    ids = torch.tensor([prompt])
    out = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=max_new_tokens,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    tokens: list[int] = out[0, len(prompt) :].tolist()
    return tokens


def prompt_of(length: int, *, vocab: int = 256, seed: int = 0) -> list[int]:
    """A random prompt."""
    generator = torch.Generator().manual_seed(seed)
    tokens: list[int] = torch.randint(0, vocab, (length,), generator=generator).tolist()
    return tokens
