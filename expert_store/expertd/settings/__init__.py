"""What the daemon is told: its settings, checked."""
