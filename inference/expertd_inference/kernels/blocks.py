"""How many tokens a block of keys and values has."""

BLOCK_TOKENS = 64
"""``BLOCK_TOKENS`` of ``native/attention.h``."""
