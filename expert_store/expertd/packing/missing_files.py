"""Why a checkpoint's weights are not where they are looked for, and what brings them there."""

import re
import shlex
from pathlib import Path

SHARD = re.compile(r"(.+)-\d{5}-of-(\d{5})\.safetensors")


def why_not_there(file: Path) -> str:
    """A sentence if ``file`` is a link to nothing, as in an incomplete cache; else empty."""
    if not file.is_symlink() or file.exists():
        return ""
    return (
        f"{file} is a link to {file.readlink()}, which is not there: the download was not "
        f"finished, or its target was removed; {_download(file.parent, file.name)}."
    )


def why_no_weights(path: Path, single: str, index: str) -> str:
    """A sentence for a directory that has neither the file ``single`` nor ``index``."""
    for name in (single, index):
        if reason := why_not_there(path / name):
            return reason
    try:
        names = sorted(entry.name for entry in path.iterdir())
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}."
    lacks = f"{path} is not a checkpoint: it has no {single} and no {index}"
    shards = [name for name in names if SHARD.fullmatch(name)]
    if shards:
        return (
            f"{path} has {len(shards)} shards such as {shards[0]}, and lacks {index}, which says "
            f"which of them are the model; {_download(path, index)}, or write it: "
            '{"metadata": {}, "weight_map": {"TENSOR": "FILE", ...}} with a line per tensor.'
        )
    variants = [name for name in names if re.fullmatch(r"model\..+\.safetensors", name)]
    if variants:
        return f"{lacks}, but the variant {variants[0]}; to pack that, link it as {single}."
    if "adapter_model.safetensors" in names or "adapter_config.json" in names:
        return (
            f"{path} is an adapter (LoRA) and not a whole model; merge it into the model that it "
            "was trained on (merge_and_unload of peft), save that, and pack it."
        )
    if any(name.startswith("consolidated") for name in names):
        return (
            f"{lacks}, but weights in their maker's own format (consolidated...); "
            f"{_download(path, '', files='the files in the form of Hugging Face')}."
        )
    if any(name.startswith("pytorch_model") and ".bin" in name for name in names):
        return (
            f"{lacks}, but PyTorch's own files (pytorch_model...bin), which are not read; load "
            "them with transformers and save them with save_pretrained, which writes safetensors."
        )
    if any(name.endswith(".safetensors") for name in names):
        other = next(name for name in names if name.endswith(".safetensors"))
        return (
            f"{lacks}; transformers reads no other, such as {other}, unless config.json names it "
            "in transformers_weights."
        )
    return f"{lacks}; {_download(path, '', files='the whole model')}."


def _download(folder: Path, name: str, *, files: str = "") -> str:
    """What brings ``name`` into ``folder``: the command, where that is a snapshot of a cache."""
    # .../models--OWNER--NAME/snapshots/COMMIT
    for parent in (folder, *folder.parents):
        if parent.name.startswith("models--"):
            repository = parent.name.removeprefix("models--").replace("--", "/")
            command = shlex.join(["hf", "download", repository, *filter(None, [name])])
            return f"fetch it again with `{command}`"
    return f"download {files or name} again"
