"""What of a checkpoint is no weights, and comes along into the pack: configuration, tokenizer."""

import errno
import os
from pathlib import Path

from expertd.packing.missing_files import why_not_there
from expertstore.errors import CheckpointError
from expertstore.pack.seeing import PROCESSOR_FILES

DOCUMENTS = ("LICENSE*", "NOTICE*", "README.md")
COPIED_FILES = (
    "config.json",
    "generation_config.json",
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "*.model",
    "*.tiktoken",
    "chat_template*",
    "additional_chat_templates/*",
    *PROCESSOR_FILES,
    *DOCUMENTS,
)


def find_side_files(source: Path, *, sees: bool = False) -> list[Path]:
    """The files that a pack brings along; of one that ``sees``, its image processor's settings too.

    Raises :class:`CheckpointError` if one is unreadable.
    """
    found = []
    for pattern in COPIED_FILES:
        if pattern in PROCESSOR_FILES and not sees:
            continue
        for file in sorted(source.glob(pattern)):
            if (reason := why_not_there(file)) and pattern not in DOCUMENTS:
                raise CheckpointError(reason)
            if not file.is_file():
                continue
            if not os.access(file, os.R_OK):
                raise CheckpointError(f"{file} cannot be read: {os.strerror(errno.EACCES)}.")
            found.append(file)
    return found
