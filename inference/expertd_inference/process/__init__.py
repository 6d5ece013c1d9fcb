"""This process: its environment, its daemon and its memory."""
