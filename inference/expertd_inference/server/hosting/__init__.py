"""Engines in processes of their own, and the models that they compute, as the front has them."""
