"""What is measured beside ours; each runs under an interpreter of its own that has it installed."""
