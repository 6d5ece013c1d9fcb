"""The worker of expertd: transformers models whose experts lie in the daemon's shared memory.

::

    from expertd_inference import load_model

    model = load_model("mixtral")
    tokenizer = AutoTokenizer.from_pretrained(model.name_or_path)

The names below are imported when they are first used, since torch and transformers take
seconds to import and neither ``expert-run --help`` nor a wrong argument needs them.
"""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from expertd_inference.engine.budget import EngineLimits
    from expertd_inference.engine.completion import Completion
    from expertd_inference.engine.decoding import Decoding
    from expertd_inference.engine.engine import Engine
    from expertd_inference.engine.stats import EngineStats
    from expertd_inference.engine.stops import FinishReason
    from expertd_inference.engine.stream import TokenStream
    from expertd_inference.engine.token import Token
    from expertd_inference.generation import GenerationResult, generate
    from expertd_inference.process.attachment import ModelAttachment, attach
    from expertd_inference.process.embedded import EmbeddedDaemon
    from expertd_inference.process.environment import prepare_environment
    from expertd_inference.settings import GenerationSettings
    from expertd_inference.worker import Worker, load_model

__all__ = [
    "Completion",
    "Decoding",
    "EmbeddedDaemon",
    "Engine",
    "EngineLimits",
    "EngineStats",
    "FinishReason",
    "GenerationResult",
    "GenerationSettings",
    "ModelAttachment",
    "Token",
    "TokenStream",
    "Worker",
    "attach",
    "generate",
    "load_model",
    "prepare_environment",
]

_MODULES = {
    "Completion": "engine.completion",
    "Decoding": "engine.decoding",
    "EmbeddedDaemon": "process.embedded",
    "Engine": "engine.engine",
    "EngineLimits": "engine.budget",
    "EngineStats": "engine.stats",
    "FinishReason": "engine.stops",
    "GenerationResult": "generation",
    "GenerationSettings": "settings",
    "ModelAttachment": "process.attachment",
    "Token": "engine.token",
    "TokenStream": "engine.stream",
    "Worker": "worker",
    "attach": "process.attachment",
    "generate": "generation",
    "load_model": "worker",
    "prepare_environment": "process.environment",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401 - whatever the module defines
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = f"{__name__}.{_MODULES[name]}"
    if module not in sys.modules:
        from expertd_inference.process.environment import garbage_kept

        with garbage_kept():
            import_module(module)
    return getattr(import_module(module), name)
