"""Write a checkpoint of ``train.py`` as a Hugging Face model directory: this one.

python examples/tiny-mixtral/export.py /tmp/tiny-mixtral/ckpt/last.pt
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import corpus
import torch
from model import build_model
from transformers import GenerationConfig, PreTrainedTokenizerFast

MAX_WEIGHT_BYTES = 32 * 2**20


def export(checkpoint: Path, directory: Path = corpus.HERE) -> None:
    """Weights in bf16, configuration and tokenizer, as transformers itself writes them."""
    state = torch.load(checkpoint, weights_only=True)
    context = state["identity"]["context"]
    model = build_model(context, state["balance_weight"])
    model.load_state_dict(state["model"])
    model.generation_config = GenerationConfig(
        bos_token_id=corpus.SEPARATOR_ID,
        eos_token_id=corpus.SEPARATOR_ID,
        pad_token_id=corpus.SEPARATOR_ID,
    )
    model.bfloat16().save_pretrained(directory)
    weights = directory / "model.safetensors"
    weights.chmod(0o644)  # safetensors creates it readable by its owner only
    size = weights.stat().st_size
    if size > MAX_WEIGHT_BYTES:
        raise SystemExit(f"model.safetensors has {size} bytes, more than {MAX_WEIGHT_BYTES}")
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=corpus.load_tokenizer(),
        bos_token=corpus.SEPARATOR,
        eos_token=corpus.SEPARATOR,
        pad_token=corpus.SEPARATOR,
        model_max_length=context,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory)
    run = {
        "steps": state["step"],
        "tokens": state["step"] * state["identity"]["rows"] * context,
        "minutes": round(state["seconds"] / 60, 1),
        "epochs_begun": {name: place["epoch"] + 1 for name, place in state["windows"].items()},
        **state["identity"],
    }
    (directory / "training.json").write_text(json.dumps(run, indent=2) + "\n")


def main() -> None:
    """Export one checkpoint."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--out", type=Path, default=corpus.HERE)
    arguments = parser.parse_args()
    export(arguments.checkpoint, arguments.out)


if __name__ == "__main__":
    main()
