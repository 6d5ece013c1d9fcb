"""Which models see, as far as expertd serves that: declared here, and nowhere else.

A pack sees if its architecture is one of these and it has the settings of its image processor:
``expertd pack --text-only`` leaves both these and the vision part's weights out.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
"""The settings of an image processor are in one of them."""

SEEING: Mapping[str, str] = {
    "gemma4": "Gemma4ForConditionalGeneration",
    "glm4v_moe": "Glm4vMoeForConditionalGeneration",
    "qwen3_5_moe": "Qwen3_5MoeForConditionalGeneration",
    "qwen3_vl_moe": "Qwen3VLMoeForConditionalGeneration",
}
"""transformers' class by ``model_type``. Each is held against transformers by a test."""

TEXT_WITHIN: Mapping[str, str] = {
    "glm5_next": "Glm5NextForConditionalGeneration",
    "kimi_k25": "Kimi_K25ForConditionalGeneration",
    "mistral_large4": "MistralLarge4ForConditionalGeneration",
}
"""Classes whose language model transformers has nowhere else: that is served, and sees nothing."""

_IN_TURNS = "its attention is computed in turns, without images"
_NO_PROCESSOR = "transformers prepares its images by torchvision alone"
BLIND: Mapping[str, str] = {
    "ernie4_5_vl_moe": "its layers have a second set of experts, for images",
    "glm5_next": _IN_TURNS,
    "kimi_k25": _NO_PROCESSOR,
    "llama4": _NO_PROCESSOR,
    "minimax_m3_vl": _NO_PROCESSOR,
    "mistral_large4": _IN_TURNS,
    "qwen4_exp": _IN_TURNS,
}
"""By ``model_type``, why others that see are packed as text, or not at all; of a sentence."""

TEXT_PART = "model.language_model."
"""What the names of a language model's weights begin with, in a model that sees; its head apart."""


def has_processor(directory: Path) -> bool:
    """Whether a checkpoint or pack says how images are prepared."""
    return any((directory / name).is_file() for name in PROCESSOR_FILES)


def sees(pack: Path, model_type: str) -> bool:
    """Whether the pack in that directory, of a model of that type, takes images."""
    return model_type in SEEING and has_processor(pack)


def leave_out_vision(model: Any) -> None:  # noqa: ANN401 - transformers is untyped
    """Takes from a model that sees what is not its language model; it must have no weights yet."""
    for name, _ in [*model.model.named_children()]:
        if not f"model.{name}.".startswith(TEXT_PART):
            setattr(model.model, name, None)


def why_blind(name: str, model_type: str) -> str:
    """That the model of that name takes no images, and why; of a sentence."""
    if model_type in SEEING:
        return f"{name} takes text only, as it was packed without its vision part"
    why = BLIND.get(model_type.removesuffix("_text"))
    return f"{name} takes text only" + (f", since {why}" if why else "")
