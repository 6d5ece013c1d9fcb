"""What computes experts from their records; :mod:`.reference` is what the others must match."""
