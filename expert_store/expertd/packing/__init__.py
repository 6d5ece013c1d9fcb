"""Making packs out of checkpoints. The only part of the daemon's package that uses torch."""
