"""Models whose steps are not all alike, told by their class and configuration."""

import inspect
from typing import Any

import pytest
import transformers
from transformers import GenerationMixin, MixtralConfig, PhimoeConfig

from expertd_inference.execution.own_steps import _HOOKS, has_own_steps, is_repeatable


def test_models_with_steps_of_their_own() -> None:
    """Every model that transformers' loop asks for more than a forward pass goes there."""
    theirs = {
        name
        for name, function in vars(GenerationMixin).items()
        if f"self.{name}(" in inspect.getsource(GenerationMixin._sample) and callable(function)
    }
    # What says when to end, on several hosts, and how to compile.
    assert theirs - set(_HOOKS) == {"_has_unfinished_sequences", "_valid_auto_compile_criteria"}
    for name, own in {
        "PhimoeForCausalLM": True,
        "NemotronHForCausalLM": True,
        "Qwen3VLMoeForConditionalGeneration": True,
        "MixtralForCausalLM": False,
        "GptOssForCausalLM": False,
        "DeepseekV3ForCausalLM": False,
    }.items():
        assert (
            has_own_steps(getattr(transformers, name).__new__(getattr(transformers, name))) is own
        )


@pytest.mark.parametrize(
    ("config", "repeatable"),
    [
        (MixtralConfig(), True),
        (MixtralConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), False),
        (MixtralConfig(rope_parameters={"rope_type": "linear", "factor": 2.0}), True),
        (PhimoeConfig(), False),
    ],
)
def test_steps_that_can_be_recorded(config: Any, repeatable: bool) -> None:
    kind = type(config).__name__.removesuffix("Config") + "ForCausalLM"
    model = getattr(transformers, kind).__new__(getattr(transformers, kind))
    model.__dict__["config"] = config
    assert is_repeatable(model) is repeatable
