"""The pack: a model on disk in expertd's form. Reading it needs no torch."""
