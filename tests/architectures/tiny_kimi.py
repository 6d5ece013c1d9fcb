"""A tiny random Kimi K2.5: a language model within one that sees."""

from pathlib import Path

import torch
import transformers

from expertd_testing.tiny_models import randomize, save_model
from tests.architectures.tiny_configs import tiny_config


def make_kimi_checkpoint(path: Path) -> Path:
    """Writes one to ``path``, in bfloat16; returns ``path``."""
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1}
    config = transformers.Kimi_K25Config(
        text_config=tiny_config("deepseek_v3", num_hidden_layers=2).to_dict(),
        vision_config={**vision, "num_attention_heads": 2, "image_size": 64},
        image_token_id=250,
    )
    model = transformers.Kimi_K25ForConditionalGeneration(config)
    randomize(model, seed=0)
    save_model(model.to(torch.bfloat16), path)
    return path
