"""Computing a step of a model."""
