"""Gaps between two texts, in the tokens that a model was trained to fill them by."""

from collections.abc import Sequence

from expertd_inference.server.api.errors import unsupported
from expertd_inference.server.hosting.model_text import ModelText

_MARKERS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # Granite, StarCoder
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    ("<\uff5cfim▁begin\uff5c>", "<\uff5cfim▁hole\uff5c>", "<\uff5cfim▁end\uff5c>"),  # DeepSeek
)
"""What stands before the text before a gap, before the text after it, and before what fills it."""
_FILE = "<|file_sep|>"
"""Qwen's, before a file of the same repository."""


def gap(
    text: ModelText,
    before: str,
    after: str,
    begun: str = "",
    files: Sequence[tuple[str, str]] = (),
    param: str = "suffix",
) -> str:
    """The prompt whose continuation fills the gap; ``begun`` is what fills it so far.

    ``files`` are names and texts of others that may help. Raises ApiError for a model without
    tokens for gaps; ``param`` is the field that asked.
    """
    markers = next((each for each in _MARKERS if text.added_tokens.keys() >= {*each}), None)
    if markers is None:
        raise unsupported(
            param, f"is not supported: the model {text.name} has no tokens for filling gaps."
        )
    if _FILE in text.added_tokens:
        others = "".join(f"{_FILE}{name}\n{content}" for name, content in files)
        # The file with the gap is the last of them.
        others += _FILE if others else ""
    else:
        others = "".join(f"{content}\n\n" for _, content in files)
    first, second, third = markers
    return f"{others}{first}{before}{second}{after}{third}{begun}"
