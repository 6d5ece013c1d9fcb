"""GGUF files of tiny models, as llama.cpp's converter writes them: what it renames and changes.

Written from the conventions of that converter, independently of the code that reads them.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import GGMLQuantizationType as Type
from torch import Tensor
from transformers import AutoModelForCausalLM

from expertd_testing.tiny_models import byte_tokenizer, randomize
from tests.architectures.tiny_configs import tiny_config

Kinds = Callable[[str], Type]
"""The type of a matrix by its name in the file."""

TEMPLATE = "{% for m in messages %}<|end|>{{ m['content'] }}{% endfor %}"

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "deepseek_v2": ("deepseek2", {"q_lora_rank": None, "topk_method": "greedy", "n_group": 1}),
    "deepseek_v3": ("deepseek2", {}),
    "dots1": ("dots1", {}),
    "ernie4_5_moe": ("ernie4_5-moe", {}),
    "glm4_moe": ("glm4moe", {}),
    "gpt_oss": ("gpt-oss", {}),
    "granitemoe": ("granitemoe", {"embedding_multiplier": 2.0, "logits_scaling": 4.0}),
    "granitemoeshared": ("granitemoe", {"residual_multiplier": 0.5}),
    "minimax_m2": ("minimax-m2", {}),
    "mixtral": ("llama", {}),
    "olmoe": ("olmoe", {"clip_qkv": 3.0}),
    "qwen2_moe": ("qwen2moe", {"mlp_only_layers": []}),
    "qwen3_5_moe_text": (
        "qwen35moe",
        {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 32},
    ),
    "qwen3_moe": ("qwen3moe", {"norm_topk_prob": True}),
    "qwen3_next": (
        "qwen3next",
        {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_value_head_dim": 32},
    ),
}
"""By transformers' type of model: llama.cpp's architecture, and settings of a tiny one."""


def make_gguf_model(model_type: str, **overrides: Any) -> Any:
    """A random model in bfloat16 of a type in :data:`MODELS`."""
    settings = {**MODELS[model_type][1], **overrides}
    config = tiny_config(model_type, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed=0)
    return model.to(torch.bfloat16).eval()


def write_gguf(model: Any, path: Path, kinds: Kinds = lambda _: Type.BF16, **more: Any) -> Path:
    """Writes ``model``, its matrices in ``kinds``; the rest is F32.

    ``more`` goes to the writer: ``split_max_tensors=N`` writes parts. Returns the (first) file.
    """
    architecture = MODELS[model.config.model_type][0]
    writer = gguf.GGUFWriter(path, architecture, **more)
    for key, value in _metadata(model.config).items():
        if isinstance(value, list):
            writer.add_array(f"{architecture}.{key}", value)
        elif isinstance(value, str):
            writer.add_string(f"{architecture}.{key}", value)
        elif isinstance(value, bool):
            writer.add_bool(f"{architecture}.{key}", value)
        elif isinstance(value, int):
            writer.add_uint32(f"{architecture}.{key}", value)
        else:
            writer.add_float32(f"{architecture}.{key}", value)
    _add_tokenizer(writer)
    for name, tensor in file_tensors(model, architecture):
        is_matrix = tensor.dim() > 1 and not any(part in name for part in ("bias", "conv", "_inp"))
        values = tensor.float().contiguous().numpy()
        kind = kinds(name) if is_matrix else Type.F32
        if kind is Type.F32:
            writer.add_tensor(name, values)
        elif kind is Type.F16:
            writer.add_tensor(name, values.astype(np.float16))
        else:
            writer.add_tensor(name, to_blocks(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(iter(sorted(path.parent.glob(f"{path.stem}*.gguf"))))


def to_blocks(values: Any, kind: Type) -> Any:
    """The weights in blocks, or random blocks of a type that the gguf package cannot write."""
    try:
        return gguf.quants.quantize(values, kind)
    except NotImplementedError:
        return random_blocks(values.shape, kind)


HALVES = {
    Type.Q4_1: (0, 2),
    Type.Q2_K: (80, 82),
    Type.Q3_K: (108,),
    Type.Q4_K: (0, 2),
    Type.Q5_K: (0, 2),
    Type.Q6_K: (208,),
    Type.IQ4_XS: (0,),
    Type.IQ4_NL: (0,),
    Type.IQ3_S: (0,),
    Type.IQ2_XXS: (0,),
}
"""Where the 16-bit factors are in a block."""


def random_blocks(shape: tuple[int, ...], kind: Type, seed: int = 0) -> Any:
    """Bytes [..., bytes of a row] that are blocks of weights below one."""
    size, width = gguf.GGML_QUANT_SIZES[kind]
    generator = np.random.default_rng(seed)
    blocks = generator.integers(0, 256, (*shape[:-1], shape[-1] // size, width), dtype=np.uint8)
    for place in HALVES.get(kind, (0,)):
        factors = generator.uniform(1e-4, 1e-3, blocks.shape[:-1]).astype(np.float16)
        blocks[..., place : place + 2] = factors[..., None].view(np.uint8)
    if kind is Type.MXFP4:
        blocks[..., 0] = generator.integers(118, 124, blocks.shape[:-1])
    return blocks.reshape(*shape[:-1], -1)


def _metadata(config: Any) -> dict[str, Any]:
    """The configuration under llama.cpp's keys, without the architecture's prefix."""
    heads = config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
    rope = config.rope_parameters
    rotary = int(head_dim * rope.get("partial_rotary_factor", 1.0))
    found: dict[str, Any] = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "attention.head_count": heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(rope["rope_theta"]),
        "rope.dimension_count": rotary,
        "attention.key_length": head_dim,
    }
    for ours, theirs in _KEYS:
        value = getattr(config, ours, None)
        if isinstance(value, int | float) and value is not None:
            found[theirs] = value
    if rope["rope_type"] == "yarn":
        found |= {
            "rope.scaling.type": "yarn",
            "rope.scaling.factor": float(rope["factor"]),
            "rope.scaling.original_context_length": rope["original_max_position_embeddings"],
        }
    if hasattr(config, "kv_lora_rank"):
        nope, rotary = config.qk_nope_head_dim, config.qk_rope_head_dim
        found |= {
            "attention.head_count_kv": 1,
            "attention.key_length": config.kv_lora_rank + rotary,
            "attention.key_length_mla": nope + rotary,
            "attention.value_length_mla": config.v_head_dim,
            "rope.dimension_count": rotary,
        }
    if hasattr(config, "linear_num_value_heads"):
        values = config.linear_num_value_heads
        found |= {
            "ssm.time_step_rank": values,
            "ssm.inner_size": values * config.linear_value_head_dim,
        }
    return found


_KEYS = (
    ("intermediate_size", "feed_forward_length"),
    ("num_local_experts", "expert_count"),
    ("num_experts", "expert_count"),
    ("n_routed_experts", "expert_count"),
    ("moe_num_experts", "expert_count"),
    ("num_experts_per_tok", "expert_used_count"),
    ("moe_k", "expert_used_count"),
    ("n_group", "expert_group_count"),
    ("topk_group", "expert_group_used_count"),
    ("routed_scaling_factor", "expert_weights_scale"),
    ("norm_topk_prob", "expert_weights_norm"),
    ("sliding_window", "attention.sliding_window"),
    ("clip_qkv", "attention.clamp_kqv"),
    ("kv_lora_rank", "attention.kv_lora_rank"),
    ("q_lora_rank", "attention.q_lora_rank"),
    ("embedding_multiplier", "embedding_scale"),
    ("residual_multiplier", "residual_scale"),
    ("attention_multiplier", "attention.scale"),
    ("logits_scaling", "logit_scale"),
    ("moe_layer_interval", "interleave_moe_layer_step"),
    ("linear_conv_kernel_dim", "ssm.conv_kernel"),
    ("linear_key_head_dim", "ssm.state_size"),
    ("linear_num_key_heads", "ssm.group_count"),
)


def _add_tokenizer(writer: gguf.GGUFWriter) -> None:
    tokenizer = byte_tokenizer()
    tokens = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([token for token, _ in tokens])
    writer.add_token_types([3 if token == "<|end|>" else 1 for token, _ in tokens])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(256)
    writer.add_chat_template(TEMPLATE)


def file_tensors(model: Any, architecture: str) -> Iterator[tuple[str, Tensor]]:
    """All tensors of the file by its names, in float32."""
    numbers = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(numbers[architecture], model.config.num_hidden_layers)
    tied = set(model.all_tied_weights_keys)
    for name, parameter in model.state_dict().items():
        if name in tied:
            continue
        tensor, config = parameter.float(), model.config
        layer = name.split(".layers.")[-1].split(".")[0] if ".layers." in name else ""
        if ".experts." in name:
            yield from _experts(f"blk.{layer}.ffn_", name, tensor, config)
        elif name.endswith("kv_b_proj.weight"):
            split = tensor.view(config.num_attention_heads, -1, config.kv_lora_rank)
            keys, values = split.split([config.qk_nope_head_dim, config.v_head_dim], dim=1)
            yield f"blk.{layer}.attn_k_b.weight", keys.transpose(1, 2)
            yield f"blk.{layer}.attn_v_b.weight", values
        elif name.endswith("shared_mlp.input_linear.weight"):
            gate, up = tensor.chunk(2)
            yield f"blk.{layer}.ffn_gate_shexp.weight", gate
            yield f"blk.{layer}.ffn_up_shexp.weight", up
        elif name.endswith("in_proj_qkvz.weight"):
            heads = tensor.view(config.linear_num_key_heads, -1, tensor.shape[-1])
            keys = config.linear_key_head_dim
            values = (heads.shape[1] - 2 * keys) // 2
            pieces = heads.split([keys, keys, values, values], dim=1)
            flat = [piece.flatten(0, 1) for piece in pieces]
            yield f"blk.{layer}.attn_qkv.weight", torch.cat(flat[:3])
            yield f"blk.{layer}.attn_gate.weight", flat[3]
        else:
            yield _name(names, name, layer), _changed(name, tensor, config, architecture)


def _name(names: gguf.TensorNameMap, name: str, layer: str) -> str:
    for end, found in (
        ("e_score_correction_bias", "exp_probs_b.bias"),
        ("block_sparse_moe.router.weight", "ffn_gate_inp.weight"),
        ("linear_attn.dt_bias", "ssm_dt.bias"),
        ("linear_attn.A_log", "ssm_a"),
        ("self_attn.sinks", "attn_sinks.weight"),
    ):
        if name.endswith(end):
            return f"blk.{layer}.{found}"
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    assert found is not None, name
    return str(found)


def _experts(stem: str, name: str, tensor: Tensor, config: Any) -> Iterator[tuple[str, Tensor]]:
    """Of all experts: gate and up apart, each [experts, out, in]."""
    end = "bias" if name.endswith("bias") else "weight"
    if config.model_type == "gpt_oss" and end == "weight":
        tensor = tensor.transpose(1, 2)
    if "down_proj" in name:
        yield f"{stem}down_exps.{end}", tensor
        return
    if config.model_type == "gpt_oss":
        gate, up = tensor[:, 0::2], tensor[:, 1::2]
    else:
        gate, up = tensor.chunk(2, dim=1)
    yield f"{stem}gate_exps.{end}", gate
    yield f"{stem}up_exps.{end}", up


def _changed(name: str, tensor: Tensor, config: Any, architecture: str) -> Tensor:
    """What the converter does to other tensors."""
    if architecture in {"llama", "granitemoe"} and (".q_proj." in name or ".k_proj." in name):
        heads = config.num_attention_heads if ".q_proj." in name else config.num_key_value_heads
        pairs = tensor.view(heads, 2, -1, *tensor.shape[1:])
        return pairs.transpose(1, 2).reshape(tensor.shape)
    if architecture in {"qwen3next", "qwen35moe"}:
        if name.endswith("norm.weight") and "linear_attn" not in name:
            return tensor + 1
        if name.endswith("A_log"):
            tensor = -tensor.exp()
        if "conv1d" in name:
            tensor = tensor.squeeze(1)
        if architecture == "qwen35moe":
            tensor = _tiled(name, tensor, config)
    return tensor.squeeze(0) if name.endswith("shared_expert_gate.weight") else tensor


def _tiled(name: str, tensor: Tensor, config: Any) -> Tensor:
    """Value heads in turns over the key heads, where they were by key head."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads

    def turn(part: Tensor, size: int) -> Tensor:
        heads = part.view(keys, values // keys, size, *part.shape[1:])
        return heads.transpose(0, 1).reshape(part.shape)

    value_dim = config.linear_value_head_dim
    if any(end in name for end in ("A_log", "dt_bias", "in_proj_a", "in_proj_b")):
        return turn(tensor, 1)
    if "in_proj_z" in name:
        return turn(tensor, value_dim)
    if "in_proj_qkv" in name or "conv1d" in name:
        first = 2 * keys * config.linear_key_head_dim
        return torch.cat((tensor[:first], turn(tensor[first:], value_dim)))
    if name.endswith("linear_attn.out_proj.weight"):
        return turn(tensor.T, value_dim).T
    return tensor
