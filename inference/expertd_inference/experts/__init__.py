"""Experts of a layer: where they come from, and which come next."""
