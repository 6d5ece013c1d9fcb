"""Packs of random bytes in real models' shapes, where the parts of the bench look for them."""

from expertd.packing.shapes import SHAPES
from expertd.packing.synthetic import config_of, fill, make_pack, plan_of

__all__ = ["SHAPES", "config_of", "fill", "make_pack", "plan_of"]
