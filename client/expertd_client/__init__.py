"""The client of expertd."""
