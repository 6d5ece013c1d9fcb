"""What the table of architectures says beside what the sweep finds: each column declared once.

By the name in ``Result.architecture``. A test that tries it belongs to each entry.
"""

FORMATS: dict[str, tuple[str, ...]] = {
    "deepseek_v3": ("FP8 in blocks",),
    "gpt_oss": ("MXFP4",),
}
"""Packed formats of checkpoints that a test packs, beside 16 and 32 bits."""

SEES: frozenset[str] = frozenset()
"""Those whose images are served."""

ADAPTERS: frozenset[str] = frozenset()
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
