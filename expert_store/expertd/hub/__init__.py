"""Checkpoints that are published on a hub: found, read in pieces, and fetched file by file."""
