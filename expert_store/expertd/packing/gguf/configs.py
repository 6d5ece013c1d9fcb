"""From a GGUF file's metadata to the configuration that transformers builds the model by.

One function for each architecture of llama.cpp, by its name there. Sizes that tensors tell are
taken from these: older files lack the keys. What a file does not say is what llama.cpp's own code
for that architecture takes for granted.
"""

from collections.abc import Callable
from typing import Any

from expertd.packing.gguf.metadata import Metadata
from expertd.packing.gguf.model_file import GgufModel
from expertstore.errors import CheckpointError

Config = dict[str, Any]

_SIGMOID = 2
"""llama.cpp's number for routers whose scores are sigmoids; 1 is softmax."""


def make_config(model: GgufModel) -> Config:
    """``config.json`` of the model, without its special tokens. Raises :class:`CheckpointError`."""
    make = _CONFIGS.get(model.architecture)
    about = Metadata(model)
    if make is None:
        raise CheckpointError(
            f"{model.file} has llama.cpp's architecture {model.architecture[:32]}, which is not "
            f"read; read are {', '.join(sorted(_CONFIGS))}."
        )
    if not about.has("expert_count"):
        raise CheckpointError(
            f"{model.file} has no experts; expertd serves Mixture-of-Experts models."
        )
    if about.has_tensor("rope_freqs.weight"):
        raise CheckpointError(
            f"{model.file} has rotary frequencies of its own (rope_freqs.weight), which are not "
            "read; pack the model's checkpoint in Hugging Face's form."
        )
    return make(about)


def _common(about: Metadata, model_type: str) -> Config:
    num_heads = about.number("attention.head_count")
    return {
        "model_type": model_type,
        "hidden_size": about.number("embedding_length"),
        "num_hidden_layers": about.num_layers,
        "num_attention_heads": num_heads,
        "num_key_value_heads": max(about.per_layer("attention.head_count_kv")),
        "max_position_embeddings": about.number("context_length"),
        "rms_norm_eps": about.get("attention.layer_norm_rms_epsilon", 1e-6),
        "rope_parameters": about.rope(),
        "vocab_size": about.size("token_embd.weight", 0),
        "tie_word_embeddings": not about.has_tensor("output.weight"),
        "num_experts_per_tok": about.number("expert_used_count"),
    }


def _head_dim(about: Metadata) -> Config:
    hidden, num_heads = about.number("embedding_length"), about.number("attention.head_count")
    return {"head_dim": about.optional("attention.key_length") or hidden // max(num_heads, 1)}


def _expert_size(about: Metadata) -> int:
    return about.size("ffn_down_exps.weight", -1)


def _dense_size(about: Metadata) -> int:
    """Of the feed-forwards of dense layers."""
    return about.get("feed_forward_length", 0) or _expert_size(about)


def _shared_size(about: Metadata) -> int:
    if not about.has_tensor("ffn_down_shexp.weight"):
        return 0
    return about.size("ffn_down_shexp.weight", -1)


def _sparse_layers(about: Metadata) -> list[bool]:
    """Whether each layer has experts."""
    return [f"blk.{layer}.ffn_down_exps.weight" in about.model.tensors
            for layer in range(about.num_layers)]  # fmt: skip


def _num_dense(about: Metadata) -> int:
    """How many layers come before the first with experts."""
    return [*_sparse_layers(about), True].index(True)


def _mixtral(about: Metadata) -> Config:
    return {
        **_common(about, "mixtral"),
        **_head_dim(about),
        "intermediate_size": _expert_size(about),
        "num_local_experts": about.number("expert_count"),
        "sliding_window": about.optional("attention.sliding_window"),
    }


def _qwen2(about: Metadata) -> Config:
    sparse = _sparse_layers(about)
    return {
        **_common(about, "qwen2_moe"),
        "intermediate_size": _dense_size(about),
        "moe_intermediate_size": _expert_size(about),
        "shared_expert_intermediate_size": _shared_size(about),
        "num_experts": about.number("expert_count"),
        "norm_topk_prob": False,
        "mlp_only_layers": [layer for layer, has in enumerate(sparse) if not has],
        "qkv_bias": about.has_tensor("attn_q.bias"),
    }


def _qwen3(about: Metadata) -> Config:
    sparse = _sparse_layers(about)
    return {
        **_common(about, "qwen3_moe"),
        **_head_dim(about),
        "intermediate_size": _dense_size(about),
        "moe_intermediate_size": _expert_size(about),
        "num_experts": about.number("expert_count"),
        "norm_topk_prob": True,
        "mlp_only_layers": [layer for layer, has in enumerate(sparse) if not has],
    }


def _qwen3_next(about: Metadata, model_type: str = "qwen3_next") -> Config:
    head_dim = _head_dim(about)["head_dim"]
    num_values = about.number("ssm.time_step_rank")
    return {
        **_common(about, model_type),
        "head_dim": head_dim,
        "intermediate_size": _dense_size(about),
        "moe_intermediate_size": _expert_size(about),
        "shared_expert_intermediate_size": _shared_size(about),
        "num_experts": about.number("expert_count"),
        "norm_topk_prob": True,
        "rope_parameters": about.rope(
            partial_rotary_factor=about.number("rope.dimension_count") / head_dim
        ),
        "linear_conv_kernel_dim": about.number("ssm.conv_kernel"),
        "linear_key_head_dim": about.number("ssm.state_size"),
        "linear_num_key_heads": about.number("ssm.group_count"),
        "linear_num_value_heads": num_values,
        "linear_value_head_dim": about.number("ssm.inner_size") // max(num_values, 1),
        "layer_types": [
            "linear_attention"
            if f"blk.{layer}.ssm_out.weight" in about.model.tensors
            else "full_attention"
            for layer in range(about.num_layers)
        ],
    }


def _qwen3_5(about: Metadata) -> Config:
    config = _qwen3_next(about, "qwen3_5_moe_text")
    sections = about.model.metadata.get(f"{about.model.architecture}.rope.dimension_sections")
    if isinstance(sections, list):
        config["rope_parameters"] |= {
            "mrope_section": [section for section in sections if section],
            "mrope_interleaved": True,
        }
    return config


def _olmoe(about: Metadata) -> Config:
    clamp = about.get("attention.clamp_kqv", 0.0)
    return {
        **_common(about, "olmoe"),
        "intermediate_size": _expert_size(about),
        "num_experts": about.number("expert_count"),
        "norm_topk_prob": False,
        "clip_qkv": clamp or None,
    }


def _deepseek(about: Metadata) -> Config:
    """DeepSeek V2 by its softmax, V3 and what is built alike (Kimi K2) by its sigmoid."""
    rope_dim = about.number("rope.dimension_count")
    # Before the latent attention was absorbed, keys and values had their own lengths.
    key = about.optional("attention.key_length_mla") or about.number("attention.key_length")
    value = about.optional("attention.value_length_mla") or about.number("attention.value_length")
    is_v3 = about.has_tensor("exp_probs_b.bias") or about.get("expert_gating_func", 1) == _SIGMOID
    experts = about.number("expert_count")
    rope = about.rope()
    if about.has("rope.scaling.yarn_log_multiplier"):
        multiplier = about.get("rope.scaling.yarn_log_multiplier", 0.1)
        scale = round(10 * multiplier, 6)
        rope |= {"mscale": scale, "mscale_all_dim": scale}
        rope.pop("attention_factor", None)
    groups = about.get("expert_group_count", 1)
    config = {
        **_common(about, "deepseek_v3" if is_v3 else "deepseek_v2"),
        "num_key_value_heads": about.number("attention.head_count"),
        "rope_parameters": rope,
        "intermediate_size": _dense_size(about),
        "moe_intermediate_size": _expert_size(about),
        "n_routed_experts": experts,
        "n_shared_experts": _shared_size(about) // _expert_size(about),
        "first_k_dense_replace": _num_dense(about),
        "kv_lora_rank": about.number("attention.kv_lora_rank"),
        "q_lora_rank": about.optional("attention.q_lora_rank"),
        "qk_nope_head_dim": key - rope_dim,
        "qk_rope_head_dim": rope_dim,
        "v_head_dim": value,
        "n_group": groups,
        "topk_group": about.get("expert_group_used_count", 1),
        "norm_topk_prob": about.get("expert_weights_norm", False),
        "routed_scaling_factor": about.get("expert_weights_scale", 1.0) or 1.0,
    }
    if not is_v3:
        config |= {
            "topk_method": "group_limited_greedy" if groups > 1 else "greedy",
            "head_dim": rope_dim,
        }
    return config


def _gpt_oss(about: Metadata) -> Config:
    rope = about.rope()
    if rope["rope_type"] == "yarn":
        # As it is published: llama.cpp rounds the ends of YaRN's ramp, which few frequencies see.
        rope["truncate"] = False
    return {
        **_common(about, "gpt_oss"),
        **_head_dim(about),
        "rope_parameters": rope,
        "intermediate_size": _expert_size(about),
        "num_local_experts": about.number("expert_count"),
        "sliding_window": about.number("attention.sliding_window"),
    }


def _granite(about: Metadata) -> Config:
    shared = _shared_size(about)
    return {
        **_common(about, "granitemoeshared" if shared else "granitemoe"),
        "intermediate_size": _expert_size(about),
        "num_local_experts": about.number("expert_count"),
        "embedding_multiplier": about.get("embedding_scale", 1.0),
        "residual_multiplier": about.get("residual_scale", 1.0),
        "attention_multiplier": about.get("attention.scale", 1.0),
        "logits_scaling": about.get("logit_scale", 1.0),
        **({"shared_intermediate_size": shared} if shared else {}),
    }


def _glm4(about: Metadata) -> Config:
    head_dim = _head_dim(about)["head_dim"]
    return {
        **_common(about, "glm4_moe"),
        "head_dim": head_dim,
        "rope_parameters": about.rope(
            partial_rotary_factor=about.number("rope.dimension_count") / head_dim
        ),
        "intermediate_size": _dense_size(about),
        "attention_bias": about.has_tensor("attn_q.bias"),
        "use_qk_norm": about.has_tensor("attn_q_norm.weight"),
        **_grouped(about),
    }


def _dots1(about: Metadata) -> Config:
    return {
        **_common(about, "dots1"),
        **_head_dim(about),
        "intermediate_size": _dense_size(about),
        "attention_bias": about.has_tensor("attn_q.bias"),
        "layer_types": ["full_attention"] * about.num_layers,
        **_grouped(about),
    }


def _grouped(about: Metadata) -> Config:
    """Routing as in DeepSeek-V3, of models with its keys."""
    return {
        "moe_intermediate_size": _expert_size(about),
        "n_routed_experts": about.number("expert_count"),
        "n_shared_experts": _shared_size(about) // _expert_size(about),
        "first_k_dense_replace": _num_dense(about),
        "n_group": about.get("expert_group_count", 1),
        "topk_group": about.get("expert_group_used_count", 1),
        "norm_topk_prob": about.get("expert_weights_norm", True),
        "routed_scaling_factor": about.get("expert_weights_scale", 1.0) or 1.0,
    }


def _ernie4_5(about: Metadata) -> Config:
    config = _common(about, "ernie4_5_moe")
    sparse = _sparse_layers(about)
    return {
        **config,
        "intermediate_size": _dense_size(about),
        "moe_intermediate_size": _expert_size(about),
        "moe_num_experts": about.number("expert_count"),
        "moe_k": config.pop("num_experts_per_tok"),
        "moe_num_shared_experts": _shared_size(about) // _expert_size(about),
        "moe_layer_start_index": _num_dense(about),
        "moe_layer_end_index": len(sparse) - 1 - sparse[::-1].index(True) if any(sparse) else -1,
        "moe_layer_interval": about.get("interleave_moe_layer_step", 1),
        "use_bias": about.has_tensor("attn_q.bias"),
    }


def _minimax_m2(about: Metadata) -> Config:
    head_dim = _head_dim(about)["head_dim"]
    return {
        **_common(about, "minimax_m2"),
        "head_dim": head_dim,
        "rope_parameters": about.rope(
            partial_rotary_factor=about.number("rope.dimension_count") / head_dim
        ),
        "intermediate_size": _expert_size(about),
        "num_local_experts": about.number("expert_count"),
    }


_CONFIGS: dict[str, Callable[[Metadata], Config]] = {
    "deepseek2": _deepseek,
    "dots1": _dots1,
    "ernie4_5-moe": _ernie4_5,
    "glm4moe": _glm4,
    "gpt-oss": _gpt_oss,
    "granitemoe": _granite,
    "llama": _mixtral,
    "minimax-m2": _minimax_m2,
    "olmoe": _olmoe,
    "qwen2moe": _qwen2,
    "qwen35moe": _qwen3_5,
    "qwen3moe": _qwen3,
    "qwen3next": _qwen3_next,
}
"""By llama.cpp's ``general.architecture``."""
