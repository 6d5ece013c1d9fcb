"""The inference worker of expertd."""
