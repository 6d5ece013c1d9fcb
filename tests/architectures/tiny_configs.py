"""A tiny configuration of any architecture of transformers whose experts can be replaced.

What the architectures call alike is set alike; a few need more, since they mix kinds of layers
or ask for sizes that fit each other.
"""

import dataclasses
from pathlib import Path
from typing import Any

import transformers
from transformers import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from expertd_testing.tiny_models import VOCAB

_SEAM = "@use_experts_implementation"
OUTSIDE = {"llama4"}
"""Those outside of it that are served."""
_GENERIC: dict[str, Any] = {
    "vocab_size": VOCAB,
    "hidden_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "shared_expert_intermediate_size": 128,
    "shared_intermediate_size": 128,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "num_experts_per_token": 2,
    "moe_topk": 2,
    "top_k_experts": 2,
    "moe_k": 2,
    "max_position_embeddings": 512,
    "bos_token_id": VOCAB - 1,
    "eos_token_id": VOCAB - 1,
    "pad_token_id": None,
    "q_lora_rank": 64,
    "kv_lora_rank": 64,
    "qk_nope_head_dim": 32,
    "qk_rope_head_dim": 32,
    "v_head_dim": 32,
    # Group-limited routing, where the architecture has it.
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
}
_ALTERNATING = ["linear_attention", "full_attention"] * 2
_SPECIAL: dict[str, dict[str, Any]] = {
    "bailing_hybrid": {"layer_group_size": 2},
    "deepseek_v2": {"topk_method": "group_limited_greedy"},
    "dots3_note_text": {
        "swa_num_attention_heads": 4,
        "swa_num_key_value_heads": 4,
        "swa_q_lora_rank": 64,
        "swa_kv_lora_rank": 64,
        "swa_head_dim": 64,
        "swa_qk_nope_head_dim": 32,
        "swa_v_head_dim": 32,
    },
    "gemma4_text": {
        "enable_moe_block": True,
        "vocab_size_per_layer_input": VOCAB,
        "hidden_size_per_layer_input": 32,
    },
    "granitemoehybrid": {"layer_types": _ALTERNATING, "mamba_n_heads": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"layer_types": _ALTERNATING, "linear_num_heads": 4, "linear_head_dim": 32},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"] * 2, "num_dense_layers": 1},
    "inkling2_text": {"unpadded_vocab_size": VOCAB},
    "inkling2_loop_text": {
        "unpadded_vocab_size": VOCAB,
        "n_layers_per_attn_res_block": 1,
        "loop_layer_index_start": 1,
        "loop_layer_index_end": 3,
    },
    # Chunks of attention that the tried texts are longer than.
    "llama4_text": {
        "moe_layers": [0, 1, 3],
        "attention_chunk_size": 16,
        "intermediate_size_mlp": 256,
    },
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "moe", "mlp"],
        "mamba_num_heads": 8,
        "mamba_head_dim": 32,
        "n_groups": 2,
        "ssm_state_size": 32,
        "chunk_size": 16,
        "moe_shared_expert_intermediate_size": 128,
        # As Nemotron 3 Super has it; Nano has none.
        "hidden_size": 256,
        "moe_latent_size": 128,
    },
    "qwen4_exp_text": {
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 32,
        "indexer_budget": 64,
        "indexer_compress_ratio": 4,
    },
    "zaya": {"num_experts_per_tok": 1},
}


def architectures() -> list[str]:
    """The model types of this transformers whose modelling file uses its experts seam."""
    models = Path(transformers.__file__).parent / "models"
    return [
        file.parent.name
        for file in sorted(models.glob("*/modeling_*.py"))
        if _SEAM in file.read_text() or file.parent.name in OUTSIDE
    ]


def language_model_type(architecture: str) -> str | None:
    """The type of its configuration that makes a language model; None if none does.

    Of models that also see or hear, it is that of the text alone.
    """
    for model_type in (f"{architecture}_text", architecture):
        if model_type in CONFIG_MAPPING and model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
            return model_type
    return None


def tiny_config(model_type: str, **overrides: Any) -> PreTrainedConfig:
    """A configuration of that type with 4 layers, 8 experts and 2 of them per token."""
    kind = CONFIG_MAPPING[model_type]
    known = {field.name for field in dataclasses.fields(kind)} | set(kind.attribute_map)
    settings = {name: value for name, value in _GENERIC.items() if name in known}
    if "kv_lora_rank" in settings and "num_key_value_heads" in settings:
        # Latent attention has as many keys as queries.
        settings["num_key_value_heads"] = settings["num_attention_heads"]
    return kind(**settings | _SPECIAL.get(model_type, {}) | overrides)
