"""The tokenizer of a pack; needs no torch."""

from pathlib import Path
from typing import Any

import tokenizers
import transformers
from transformers import AutoTokenizer

from expertd_inference.process.reasons import reason_of
from expertstore.errors import PackError

_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "tekken.json", "vocab.json"),
    *("*.model", "*.tiktoken"),
)
"""Of which a tokenizer has some."""


def load_tokenizer(pack: Path) -> Any:  # noqa: ANN401 - transformers is untyped
    """The tokenizer of the pack in directory ``pack``. Raises PackError if it has none to use."""
    try:
        # Never code of the pack's, for which transformers would ask on the terminal.
        return AutoTokenizer.from_pretrained(pack, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the tokenizers library has none but Exception
        if not any(any(pack.glob(name)) for name in _FILES):
            raise PackError(
                f"{pack} has no usable tokenizer: it has none of {', '.join(_FILES)}; pack a "
                "checkpoint that has its tokenizer beside it."
            ) from error
        raise PackError(
            f"{pack} has no usable tokenizer for transformers {transformers.__version__} and "
            f"tokenizers {tokenizers.__version__}: {reason_of(error)}; copy its files again, or "
            "install newer ones."
        ) from error
