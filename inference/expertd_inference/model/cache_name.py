"""What transformers calls a cache of keys, values and states."""

from transformers.modeling_outputs import CausalLMOutputWithPast

CACHE = "cache" if hasattr(CausalLMOutputWithPast, "cache") else "past_key_values"
"""Among the arguments of models and in what they return; transformers 5.24 has renamed it."""
