"""docs/models.md: every command in it, on a tiny stand-in of the same form, from our own hub."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import typer
from gguf import GGMLQuantizationType as Type
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

from expertd.cli import pack
from expertd_testing.forked_command import ForkedCommand
from expertd_testing.hub import Hub, serving_hub
from expertd_testing.tiny_models import randomize, save_model
from expertd_testing.tiny_seeing import make_seeing_checkpoint
from expertstore.pack.layout import Encoding
from expertstore.pack.manifest import read_manifest
from tests.architectures.tiny_configs import tiny_config
from tests.architectures.tiny_kimi import make_kimi_checkpoint
from tests.gguf_files import make_gguf_model, write_gguf
from tests.random_mxfp4 import make_mxfp4_checkpoint
from tests.stored_weights import DEEPSEEK_V4, KINDS, Kind, fp8, store

ROOT = Path(__file__).parent.parent
COMMANDS = re.findall(r"^(expert.*)$", (ROOT / "docs/models.md").read_text(), re.MULTILINE)
PACKS = [line for line in COMMANDS if line.startswith("expertd pack")]
FIRST = "openai/gpt-oss-20b"
BLOCKS = fp8("weight_scale_inv", (128, 128), weight_block_size=[128, 128])
NGRAMS = {
    "ple_layer_ids": [1],
    "ple_embed_dim": 64,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 211,
    "make_ngram_vocab_size_divisible_by": 8,
    "split_ngram_parts": 3,
}
LINEAR = {
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_value_head_dim": 32,
    "layer_types": ["linear_attention", "full_attention"],
}

SMALL_TABLES = ["--table-min", "1KiB"]
"""Those of the stand-ins are tables, too, as those of their models are."""

Make = Callable[[Path], Path]
"""Writes a repository into a folder, and returns where it lies."""


def plain(model_type: str, **settings: object) -> Make:
    """In 16 bits, text only."""

    def make(folder: Path) -> Path:
        config = tiny_config(model_type, num_hidden_layers=2, **settings)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        randomize(model, seed=0)
        save_model(model.to(torch.bfloat16), folder / "plain")
        return folder / "plain"

    return make


def seeing(model_type: str) -> Make:
    """In 16 bits, with a vision part."""
    return lambda folder: make_seeing_checkpoint(model_type, folder / "plain")


def stored(make_plain: Make, kinds: dict[str, Kind]) -> Make:
    """Quantized by its makers."""

    def make(folder: Path) -> Path:
        beside = make_plain(folder)
        made = store(folder, kinds)
        for file in beside.iterdir():
            if not (made / file.name).exists():
                file.rename(made / file.name)
        return made

    return make


def gguf(folder: Path) -> Path:
    """A repository of files for llama.cpp."""
    (folder / "gguf").mkdir()
    model = make_gguf_model(
        "qwen3_5_moe_text", num_hidden_layers=2, hidden_size=256, layer_types=LINEAR["layer_types"]
    )
    write_gguf(model, folder / "gguf/tiny-Q4_K_M.gguf", lambda _: Type.Q8_0)
    return folder / "gguf"


STANDINS: dict[str, tuple[Make, Encoding]] = {
    FIRST: (make_mxfp4_checkpoint, Encoding.MXFP4),
    "openai/gpt-oss-120b": (make_mxfp4_checkpoint, Encoding.MXFP4),
    "Qwen/Qwen3.6-35B-A3B": (seeing("qwen3_5_moe"), Encoding.HQQ),
    "Qwen/Qwen3.6-35B-A3B-FP8": (
        stored(
            seeing("qwen3_5_moe"), {".shared_expert.up_proj.weight": BLOCKS, ".experts.": BLOCKS}
        ),
        Encoding.FP8,
    ),
    "unsloth/Qwen3.6-35B-A3B-GGUF:Q4_K_M": (gguf, Encoding.INT),
    "Qwen/Qwen3.8-Flash-Next": (
        plain("qwen4_exp_text", layer_types=LINEAR["layer_types"], **NGRAMS),
        Encoding.HQQ,
    ),
    "deepseek-ai/DeepSeek-V4-Flash": (stored(plain("deepseek_v4"), DEEPSEEK_V4), Encoding.MXFP4),
    "zai-org/GLM-5.2-FP8": (stored(plain("glm_moe_dsa"), {"_proj.weight": BLOCKS}), Encoding.FP8),
    "moonshotai/Kimi-K2.6": (
        stored(lambda path: make_kimi_checkpoint(path / "plain"), {".experts.": KINDS["ct-int4"]}),
        Encoding.INT,
    ),
    "MiniMaxAI/MiniMax-M2": (stored(plain("minimax_m2"), {".experts.": BLOCKS}), Encoding.FP8),
    "google/gemma-4-26B-A4B-it": (seeing("gemma4"), Encoding.HQQ),
    "nvidia/NVIDIA-Nemotron-3-Super-120B-A12B-NVFP4": (
        stored(plain("nemotron_h"), {".experts.": KINDS["modelopt-nvfp4"]}),
        Encoding.NVFP4,
    ),
    "mistralai/Mixtral-8x7B-Instruct-v0.1": (plain("mixtral"), Encoding.HQQ),
}
"""By the names in the page: a tiny model of the same form, and what its experts are in the pack."""


WITH_TABLES = {"Qwen/Qwen3.8-Flash-Next", "google/gemma-4-26B-A4B-it"}


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    monkeypatch.setenv("EXPERTD_PACKS", str(tmp_path / "packs"))
    with serving_hub() as hub:
        monkeypatch.setenv("HF_ENDPOINT", hub.url)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
        yield hub


def test_the_page_has_all_of_these() -> None:
    assert {line.split()[2] for line in PACKS} == {*STANDINS}
    others = [line for line in COMMANDS if line not in PACKS]
    assert [line.split()[:2] for line in others] == [
        ["expert-run", "serve"],
        ["expert-run", "generate"],
    ]


@pytest.mark.parametrize("name", STANDINS)
def test_from_its_name_to_a_text(name: str, hub: Hub, tmp_path: Path) -> None:
    make, encoding = STANDINS[name]
    hub.repositories[name.split(":")[0]] = make(tmp_path)
    app = typer.Typer()
    app.callback()(lambda: None)
    pack.register(app)
    (line,) = {line for line in PACKS if line.split()[2] == name}
    done = CliRunner(env={"COLUMNS": "200"}).invoke(
        app, [*line.split()[1:], "--no-optimize", *SMALL_TABLES]
    )
    assert done.exit_code == 0, done.output
    (made,) = (tmp_path / "packs").iterdir()
    manifest = read_manifest(made).manifest
    assert {matrix.encoding for matrix in manifest.layouts[0].matrices} == {encoding}
    assert bool(manifest.tables) == (name in WITH_TABLES)
    (line,) = (line for line in COMMANDS if line.startswith("expert-run generate"))
    words = line.replace(FIRST.split("/")[1], str(made)).split(" --prompt ")
    process = ForkedCommand(*words[0].split()[1:], "--max-new-tokens", "3", "--prompt", "Once")
    text, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    assert text.strip()
