"""Models whose steps are not all alike, or that do something at each step beside a forward pass."""

from typing import Any

from transformers import GenerationMixin

from expertd_inference.model.pack_config import rope_kinds

_HOOKS = (
    "prepare_inputs_for_generation",
    "_update_model_kwargs_for_generation",
    "_prepare_position_ids_for_generation",
    "_prefill",
    "_sample",
    "_optimize_model_for_decode",
)
"""What transformers' loop asks the model at each step, and ours does not."""


def has_own_steps(model: Any) -> bool:  # noqa: ANN401 - transformers is untyped
    """Whether the model's class does something of its own at each step beside its forward pass.

    Phi-MoE, for one, computes all keys and values anew once the text is longer than its original
    context.
    """
    kind = type(model)
    return any(
        getattr(kind, name, None) is not getattr(GenerationMixin, name, None) for name in _HOOKS
    )


def is_repeatable(model: Any) -> bool:  # noqa: ANN401 - transformers is untyped
    """Whether a step does what the one before did, so that it can be recorded and repeated.

    Angles that depend on the length of the text are chosen in Python, which no recording has.
    """
    return not has_own_steps(model) and not any(
        kind.get("rope_type") in ("dynamic", "longrope")
        for kind in rope_kinds(model.config.get_text_config())
    )
