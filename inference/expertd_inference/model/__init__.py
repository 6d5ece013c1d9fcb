"""A transformers model without its experts, from a pack."""
