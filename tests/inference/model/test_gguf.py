"""A pack of a GGUF file beside transformers, which reads the file itself."""

from pathlib import Path
from typing import Any

import pytest
import torch
import typer
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner, Result

from expertd.cli import pack as pack_command
from expertd_inference.kernels.cpu.choice import ReferenceKernels
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.model.tokenizer import load_tokenizer
from expertd_testing.tiny_models import byte_tokenizer
from expertstore.pack.layout import Encoding
from expertstore.pack.manifest import read_manifest
from tests.architectures.parity import load, logits
from tests.gguf_files import TEMPLATE, make_gguf_model, write_gguf
from tests.inference.greedy import prompt_of

KINDS = {
    "gate_exps": Type.Q4_0,
    "up_exps": Type.Q4_0,
    "down_exps": Type.Q8_0,
    "attn_": Type.Q8_0,
    "output": Type.F16,
}


def kind_of(name: str) -> Type:
    return next((kind for part, kind in KINDS.items() if part in name), Type.BF16)


def run(*arguments: object) -> Result:
    app = typer.Typer()
    pack_command.register(app)
    return CliRunner(env={"COLUMNS": "200"}).invoke(app, [str(word) for word in arguments])


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of a model in three parts."""
    folder = tmp_path_factory.mktemp("gguf")
    model = make_gguf_model("qwen3_moe", num_hidden_layers=2, max_position_embeddings=128)
    write_gguf(model, folder / "tiny.gguf", kind_of, split_max_tensors=10)
    return sorted(folder.glob("*.gguf"))


@pytest.fixture(scope="module")
def packed(files: list[Path]) -> Path:
    """Of the last part, as the command packs it."""
    assert len(files) == 3
    result = run(files[-1], files[0].parent / "tiny")
    assert result.exit_code == 0, result.output
    assert result.stderr.splitlines()[0] == f"packing {files[-1].name} as as-is"
    assert not (files[0].parent / "tiny.partial").exists()
    return files[0].parent / "tiny"


def test_experts_and_attention_are_kept(packed: Path) -> None:
    manifest = read_manifest(packed).manifest
    (layout,) = manifest.layouts
    forms = [(each.encoding, each.bits, each.group_size) for each in layout.matrices]
    assert forms == [(Encoding.INT, 4, 32), (Encoding.INT, 8, 32)]
    kept = {(each.matrix.bits, each.matrix.group_size) for each in manifest.trunk_quantized}
    assert kept == {(8, 32)}
    assert len(manifest.trunk_quantized) == 8


def test_logits_are_those_of_the_weights_in_the_file(packed: Path, tmp_path: Path) -> None:
    """transformers reads GGUF in one file; it dequantizes by itself, but guesses sizes."""
    model = make_gguf_model("qwen3_moe", num_hidden_layers=2, max_position_embeddings=128)
    write_gguf(model, tmp_path / "tiny.gguf", kind_of)
    theirs = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", config=model.config, dtype=torch.float32
    )
    prompt = prompt_of(40, seed=1)
    expected = logits(theirs, prompt)
    for kernels in (ReferenceKernels(), NativeKernels()):
        found = logits(load(packed, torch.float32, kernels), prompt)
        error = (found - expected).norm() / expected.norm()
        # The head comes in F16, and the pack has it in bfloat16.
        assert error < 2e-3


def test_the_tokenizer_is_that_of_the_file(packed: Path) -> None:
    tokenizer: Any = load_tokenizer(packed)
    expected = byte_tokenizer()
    text = "Grüße <|end|> 123\n\n"
    assert tokenizer.encode(text) == expected.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == expected.decode(expected.encode(text))
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (256, 256)
    assert tokenizer.chat_template == TEMPLATE
    chat = tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert chat == "<|end|>hi"
