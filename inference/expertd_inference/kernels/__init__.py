"""What computes experts from their records; :mod:`.cpu.reference` is what the others must match."""
