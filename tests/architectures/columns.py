"""What the table of architectures says beside what the sweep finds: each column declared once.

By the name in ``Result.architecture``. A test that tries it belongs to each entry.
"""

from expertstore.pack.seeing import SEEING

FORMATS: dict[str, tuple[str, ...]] = {
    "deepseek_v3": ("FP8", "GGUF"),
    "deepseek_v2": ("GGUF",),
    "deepseek_v4": ("MXFP4 with FP8",),
    "dots1": ("GGUF",),
    "ernie4_5_moe": ("GGUF",),
    "glm4_moe": ("GGUF",),
    "glm_moe_dsa": ("FP8",),
    "gpt_oss": ("MXFP4", "GGUF"),
    "granitemoe": ("FP8", "NVFP4", "INT4", "GGUF"),
    "granitemoeshared": ("GGUF",),
    "minimax_m2": ("FP8", "GGUF"),
    "mixtral": ("GGUF",),
    "nemotron_h": ("NVFP4",),
    "olmoe": ("GGUF",),
    "qwen2_moe": ("GGUF",),
    "kimi_k25": ("INT4",),
    "qwen3_5_moe": ("FP8", "GGUF"),
    "qwen3_moe": ("all", "GGUF"),
    "qwen3_next": ("GGUF",),
}
"""Packed formats of checkpoints that a test packs, beside 16 and 32 bits."""

SEES = frozenset(SEEING)
"""Those whose images are served."""

ADAPTERS = frozenset({"mixtral"})
"""Those with which adapters (LoRA) are tried."""

REFUSED: dict[str, str] = {
    "DbrxForCausalLM": "its experts (DbrxExperts) are outside of transformers' experts interface, "
    "and w1, v1 and w2 of all of them lie in one matrix each; a transformers that lets them be "
    "replaced would help",
    "JetMoeForCausalLM": "its experts (JetMoeMoA, JetMoeMoE) are outside of transformers' experts "
    "interface, and are part of its attention, too; nothing short of kernels of its own would help",
    "LongcatFlashForCausalLM": "its experts (LongcatFlashExperts), some of which only hand on "
    "their rows, are outside of transformers' experts interface; a transformers that lets them be "
    "replaced would help",
    "SwitchTransformersForConditionalGeneration": "it and NLLB-MoE have an encoder beside their "
    "decoder, and their experts (SwitchTransformersExperts, NllbMoeExperts) are modules of their "
    "own; an executor of such models and transformers' experts interface would help",
}
"""Refused ones that the sweep does not meet, since they do not use the interface."""
