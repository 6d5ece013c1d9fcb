"""Packs of random bytes in real models' shapes, where the parts of the bench look for them."""

from typing import Any

from expertd.packing.shapes import SHAPES
from expertd.packing.synthetic import BRANCH_GAIN, config_of, fill, make_pack, plan_of

__all__ = ["BRANCH_GAIN", "SHAPES", "TINY", "config_of", "fill", "make_pack", "plan_of"]

TINY: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "moe_intermediate_size": 128,
    "head_dim": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "vocab_size": 256,
}
"""Overrides any shape: a model to see it work with."""
