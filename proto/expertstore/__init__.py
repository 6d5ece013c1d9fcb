"""What the daemon and its clients share: the pack format, shared memory, the protocol, errors."""

__version__ = "0.1.0"
