"""Experts on a device of its own memory: cache, copies, speculation."""
