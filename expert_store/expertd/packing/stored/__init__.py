"""Weights that a checkpoint holds quantized: found by headers, read, kept as they are."""
