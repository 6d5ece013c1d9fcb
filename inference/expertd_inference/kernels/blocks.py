"""How many tokens a block of keys and values has. No torch: commands import it for their help."""

BLOCK_TOKENS = 64
"""The tokens whose keys and values, of all layers, lie in one block; see native/attention.h."""
