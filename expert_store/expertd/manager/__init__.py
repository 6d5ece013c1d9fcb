"""The service manager: what it is told, and what outlives the daemon in its keeping."""
