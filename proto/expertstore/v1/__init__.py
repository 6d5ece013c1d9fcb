"""Version 1 of the ExpertStore service."""
