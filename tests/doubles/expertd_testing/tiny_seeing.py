"""Tiny random checkpoints of models that see, with their image processors."""

import json
from collections.abc import Mapping
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
import transformers
from PIL import Image

from expertd_testing.tiny_models import HIDDEN, VOCAB, byte_tokenizer, randomize
from expertstore.pack.seeing import SEEING

IMAGE, VIDEO, BEGIN, END = range(VOCAB, VOCAB + 4)
"""The tokens of an image, of a video, and around them."""
MARKERS = ["<|image|>", "<|video|>", "<|begin|>", "<|end of image|>"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% if m.content is string %}{{ m.content }}{% else %}"
    "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}"
    f"{MARKERS[2]}{MARKERS[0]}{MARKERS[3]}"
    "{% endif %}{% endfor %}{% endif %}\n{% endfor %}assistant: "
)

_TEXT: dict[str, Any] = {
    "vocab_size": 272,
    "hidden_size": HIDDEN,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "bos_token_id": VOCAB - 1,
    "eos_token_id": VOCAB - 1,
    "pad_token_id": None,
}
_MROPE = {"rope_type": "default", "rope_theta": 10_000.0, "mrope_section": [6, 5, 5]}
_QWEN_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 64,
    "num_heads": 2,
    "intermediate_size": 64,
    "out_hidden_size": HIDDEN,
    "patch_size": 16,
    "spatial_merge_size": 2,
    "temporal_patch_size": 2,
    "num_position_embeddings": 16,
}
_QWEN_PROCESSOR: dict[str, Any] = {
    "image_processor_type": "Qwen2VLImageProcessor",
    "patch_size": 16,
    "temporal_patch_size": 2,
    "merge_size": 2,
    "size": {"shortest_edge": 32 * 32, "longest_edge": 32 * 32 * 24},
}

TINY: Mapping[str, tuple[dict[str, Any], dict[str, Any], dict[str, Any]]] = {
    "gemma4": (
        {
            "num_experts": 8,
            "top_k_experts": 2,
            "enable_moe_block": True,
            "hidden_size_per_layer_input": 32,
            "vocab_size_per_layer_input": 272,
            "global_head_dim": 32,
            "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
            "sliding_window": 48,
            "use_bidirectional_attention": "vision",
            "pad_token_id": 0,
            "tie_word_embeddings": True,
            "final_logit_softcapping": 30.0,
        },
        {
            "hidden_size": 64,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "head_dim": 32,
            "position_embedding_size": 128,
        },
        {"image_processor_type": "Gemma4ImageProcessor", "max_soft_tokens": 70},
    ),
    "glm4v_moe": (
        {
            "n_routed_experts": 8,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 2, 2],
                "partial_rotary_factor": 0.5,
            },
        },
        {
            "depth": 2,
            "hidden_size": 64,
            "num_heads": 2,
            "intermediate_size": 64,
            "out_hidden_size": HIDDEN,
            "patch_size": 16,
            "image_size": 96,
        },
        {**_QWEN_PROCESSOR, "image_processor_type": "Glm4vImageProcessor"},
    ),
    "qwen3_5_moe": (
        {
            "num_experts": 8,
            "shared_expert_intermediate_size": 128,
            "layer_types": ["linear_attention", "full_attention", "linear_attention"],
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
            "linear_key_head_dim": 32,
            "linear_value_head_dim": 32,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 10_000.0,
                "mrope_section": [4, 2, 2],
                "mrope_interleaved": True,
                "partial_rotary_factor": 0.5,
            },
        },
        _QWEN_VISION,
        _QWEN_PROCESSOR,
    ),
    "qwen3_vl_moe": (
        {"num_experts": 8, "rope_parameters": _MROPE},
        {**_QWEN_VISION, "deepstack_visual_indexes": [0, 1]},
        _QWEN_PROCESSOR,
    ),
}
"""By ``model_type``: of the text, of the vision part, of the processor."""


def make_seeing_checkpoint(model_type: str, path: Path) -> Path:
    """Writes one to ``path``, in bfloat16; returns ``path``."""
    text, vision, processor = TINY[model_type]
    kind: Any = getattr(transformers, SEEING[model_type])
    config = kind.config_class(
        text_config={**_TEXT, **text},
        vision_config=vision,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        **{f"{name}_token_id": BEGIN for name in ("vision_start", "image_start", "boi")},
        **{f"{name}_token_id": END for name in ("vision_end", "image_end", "eoi")},
    )
    model = kind(config)
    randomize(model, seed=0)
    model.to(torch.bfloat16).save_pretrained(path)
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": MARKERS})
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(path)
    (path / "preprocessor_config.json").write_text(json.dumps(processor))
    return path


def picture(width: int, height: int, seed: int = 0, form: str = "PNG") -> bytes:
    """The file of a picture of coarse random colours."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (4, 4, 3), dtype=torch.uint8, generator=generator)
    image = Image.fromarray(coarse.numpy()).resize((width, height))
    out = BytesIO()
    image.save(out, form)
    return out.getvalue()
