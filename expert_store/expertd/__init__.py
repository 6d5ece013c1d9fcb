"""expertd: the daemon that keeps a host's experts in shared RAM, and the pack format."""

__version__ = "0.1.0"
