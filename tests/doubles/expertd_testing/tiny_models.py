"""Tiny random checkpoints of the supported architectures, as transformers writes them.

The weights are drawn so that a test of routing means something: what enters a router has unit
variance, router logits spread over a few units, and the residual branches are damped, since
undamped random models collapse to a few experts after some layers.
"""

import warnings
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV2Config,
    DeepseekV3Config,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)

with warnings.catch_warnings():
    # transformers imports hqq, whose first use of torch.compile imports this deprecated part of
    # torch: imported here once, its warning is not an error in whichever test comes first.
    warnings.filterwarnings("ignore", "`torch.jit", DeprecationWarning)
    import torch.utils.mkldnn

HIDDEN = 128
VOCAB = 257
"""256 bytes and the end-of-text token."""

_COMMON: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": VOCAB - 1,
    "eos_token_id": VOCAB - 1,
    "pad_token_id": None,
    "tie_word_embeddings": False,
    "num_experts_per_tok": 2,
}
_LATENT_ATTENTION: dict[str, Any] = {
    "num_key_value_heads": 4,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    "head_dim": 32,
    # Group-limited routing: the two best experts of the best group.
    "n_group": 2,
    "topk_group": 1,
    "n_shared_experts": 1,
    "n_routed_experts": 8,
    "first_k_dense_replace": 1,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
}

CONFIGS: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "mixtral": (MixtralConfig, {"intermediate_size": 256, "num_local_experts": 8}),
    "qwen2_moe": (
        Qwen2MoeConfig,
        {
            "intermediate_size": 256,
            "moe_intermediate_size": 128,
            "shared_expert_intermediate_size": 128,
            "num_experts": 8,
            "mlp_only_layers": [1],
        },
    ),
    "qwen3_moe": (
        Qwen3MoeConfig,
        {
            "head_dim": 32,
            "intermediate_size": 256,
            "moe_intermediate_size": 128,
            "num_experts": 16,
        },
    ),
    "olmoe": (OlmoeConfig, {"intermediate_size": 128, "num_experts": 16}),
    "deepseek_v2": (
        DeepseekV2Config,
        {**_LATENT_ATTENTION, "topk_method": "group_limited_greedy"},
    ),
    "deepseek_v3": (DeepseekV3Config, _LATENT_ATTENTION),
    "gpt_oss": (
        GptOssConfig,
        {
            "head_dim": 32,
            "intermediate_size": 128,
            "num_local_experts": 8,
            "sliding_window": 64,
            "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        },
    ),
    "granitemoe": (
        GraniteMoeConfig,
        {"intermediate_size": 128, "num_local_experts": 8, "tie_word_embeddings": True},
    ),
    "glm4_moe": (
        Glm4MoeConfig,
        {
            "head_dim": 32,
            "intermediate_size": 256,
            "moe_intermediate_size": 128,
            "n_routed_experts": 8,
            "n_shared_experts": 1,
            "first_k_dense_replace": 1,
        },
    ),
    "phimoe": (PhimoeConfig, {"intermediate_size": 256, "num_local_experts": 8}),
}
"""What differs from the common settings; the keys are what :func:`make_checkpoint` takes."""


def make_checkpoint(
    architecture: str,
    path: Path,
    *,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **overrides: Any,
) -> Path:
    """Writes a random checkpoint with a byte tokenizer to ``path``; returns ``path``.

    ``overrides`` replace attributes of the architecture's configuration, say
    ``num_hidden_layers=2``. Equal arguments give equal bytes.
    """
    save_model(make_model(architecture, dtype=dtype, seed=seed, **overrides), path, max_shard_size)
    return path


def make_model(
    architecture: str, *, dtype: torch.dtype = torch.bfloat16, seed: int = 0, **overrides: Any
) -> Any:
    """The model that :func:`make_checkpoint` writes, in eval mode."""
    kind, settings = CONFIGS[architecture]
    config = kind(**{**_COMMON, **settings, **overrides})
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed)
    return model.to(dtype).eval()


def save_model(model: Any, path: Path, max_shard_size: str = "5GB") -> None:
    """Writes ``model`` with the byte tokenizer."""
    model.save_pretrained(path, max_shard_size=max_shard_size)
    byte_tokenizer().save_pretrained(path)


@torch.no_grad()
def randomize(model: nn.Module, seed: int) -> None:
    """Draws all parameters anew; see the top of this file for how."""
    generator = torch.Generator().manual_seed(seed)
    config: Any = model.config
    tied = bool(getattr(config, "tie_word_embeddings", False))
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
        if "norm" in leaf:
            noise = 1 + 0.1 * noise if leaf_is_weight(name) else 0.1 * noise
        elif "embed" in leaf:
            # Tied and large, they would make each token repeat itself.
            noise *= 0.1 if tied else 1.0
        elif leaf in {"gate", "router"}:
            noise *= 2 / parameter.shape[-1] ** 0.5
        elif parameter.dim() < 2 or "bias" in leaf:
            noise *= 0.1
        else:
            transposed = parameter.dim() == 3 and getattr(
                model.get_submodule(name.rsplit(".", 1)[0]), "is_transposed", False
            )
            noise *= parameter.shape[-2 if transposed else -1] ** -0.5
            if leaf in {"o_proj", "down_proj"}:
                noise *= 0.5
            elif leaf == "lm_head":
                noise *= 3
        parameter.copy_(noise)


def leaf_is_weight(name: str) -> bool:
    """Whether the parameter is a module's ``weight``, and not its bias."""
    return name.endswith("weight")


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer with one token per byte and ``<|end|>``."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {symbol: index for index, symbol in enumerate(alphabet)} | {"<|end|>": VOCAB - 1}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|end|>", eos_token="<|end|>"
    )
