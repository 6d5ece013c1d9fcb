"""The arena, its extents, and what is told of it to workers."""
