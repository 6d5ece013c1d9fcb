"""Models whose n-gram or per-layer embeddings lie in tables: beside stock transformers."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import closing
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_client import Client
from expertd_inference.process.attachment import attach
from expertd_inference.settings import GenerationSettings
from expertd_inference.worker import Worker
from expertd_testing.daemon import Daemon
from expertd_testing.patience import HANG_SECONDS
from expertd_testing.tiny_models import byte_tokenizer, randomize
from expertstore.errors import CheckpointError
from expertstore.pack.manifest import read_manifest
from expertstore.pack.table import TableEncoding
from expertstore.pack.verify import verify
from tests.architectures.tiny_configs import tiny_config

PROMPT = list(b"Of many rows a text reads a few; of these some again, and again.")
NGRAMS = {
    "ple_layer_ids": [1, 3],
    "ple_embed_dim": 64,
    "heads_per_ngram": 2,
    "ngram_vocab_size_base": 211,
    "make_ngram_vocab_size_divisible_by": 8,
    # The checkpoint has each table in pieces, as the published one.
    "split_ngram_parts": 3,
    "layer_types": ["linear_attention", "indexed_attention"] * 2,
}
OVERRIDES: dict[str, dict[str, Any]] = {"qwen4_exp_text": NGRAMS, "gemma4_text": {}}
Make = Callable[..., Any]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Make:
    """A checkpoint by its kind of configuration."""

    @cache
    def make(kind: str) -> Path:
        model = AutoModelForCausalLM.from_config(
            tiny_config(kind, **OVERRIDES[kind]), dtype=torch.float32
        )
        randomize(model, seed=0)
        path = tmp_path_factory.mktemp("tables") / kind
        model.bfloat16().save_pretrained(path, max_shard_size="1MB")
        byte_tokenizer().save_pretrained(path)
        return path

    return make


@pytest.fixture(scope="module")
def packed(saved: Make, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Its pack, every table in a file of its own."""

    @cache
    def make(kind: str, tables: TableEncoding = TableEncoding.PLAIN) -> Path:
        path = tmp_path_factory.mktemp("packs") / kind
        scheme = choose_scheme("bf16")
        pack(Request(saved(kind), path, scheme, optimize=False, tables=tables, table_bytes=1))
        return path

    return make


@pytest.fixture(scope="module")
def daemon(packed: Make, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    models = {
        "ngrams": packed("qwen4_exp_text"),
        "layers": packed("gemma4_text"),
        "eight": packed("qwen4_exp_text", TableEncoding.INT8),
    }
    socket = tmp_path_factory.mktemp("daemon") / "s"
    started = Daemon(models, ram="16MiB", socket=socket, arguments=("--table-ram", "100KiB"))
    started.wait_ready()
    yield started
    started.close()


@torch.no_grad()
def logits(model: Any) -> Tensor:
    result: Tensor = model(torch.tensor([PROMPT])).logits
    return result


def tables_of(daemon: Daemon, model: str) -> list[dict[str, Any]]:
    with closing(Client(daemon.socket)) as client:
        (found,) = (each for each in client.stats()["models"] if each["name"] == model)
        tables: list[dict[str, Any]] = found["tables"]
        return tables


@pytest.mark.parametrize(
    ("name", "kind"), [("ngrams", "qwen4_exp_text"), ("layers", "gemma4_text")]
)
def test_the_same_bits_as_stock(daemon: Daemon, saved: Make, name: str, kind: str) -> None:
    stock = AutoModelForCausalLM.from_pretrained(saved(kind), dtype=torch.bfloat16)
    with closing(Worker(attach(name, daemon.socket))) as worker:
        expected = logits(stock)
        assert torch.equal(logits(worker.model), expected)
        before = tables_of(daemon, name)
        assert torch.equal(logits(worker.model), expected), "with rows that are there already"
        prompt, settings = torch.tensor([PROMPT]), {"max_new_tokens": 8, "do_sample": False}
        assert torch.equal(
            worker.model.generate(prompt, **settings), stock.generate(prompt, **settings)
        )
    with closing(Worker(attach(name, daemon.socket))) as second:
        assert torch.equal(logits(second.model), expected)
    for table, earlier in zip(tables_of(daemon, name), before, strict=True):
        assert 0 < earlier["num_resident"] * table["row_bytes"] <= table["cache_bytes"]
        assert table["hits"] > earlier["hits"], "one copy for both workers"
        assert table["nvme_bytes_read"] >= earlier["nvme_bytes_read"] > 0
        assert table["rows_lost"] == 0


def test_rows_that_do_not_fit_together(daemon: Daemon) -> None:
    """The cache has fewer rows than the prompt needs, which then come as they are read."""
    for table in tables_of(daemon, "ngrams"):
        assert table["num_resident"] < table["num_rows"]
        assert table["evictions"] > 0


def test_a_prompt_that_arrives_is_hinted_at(
    daemon: Daemon, packed: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    with closing(Worker(attach("eight", daemon.socket))) as worker:
        expect, expected = worker.expect, list[list[int]]()
        worker.expect(PROMPT)
        deadline = time.monotonic() + HANG_SECONDS
        while min(table["prefetched"] for table in tables_of(daemon, "eight")) < 50:
            assert time.monotonic() < deadline, "the rows were not read"
            time.sleep(0.01)

        def note(tokens: list[int]) -> None:
            expected.append(tokens)
            expect(tokens)

        monkeypatch.setattr(worker, "expect", note)
        worker.engine.generate([PROMPT], GenerationSettings(max_new_tokens=1))
        assert expected == [PROMPT]
    for table in tables_of(daemon, "eight"):
        assert table["hits"] > 50, "they were there when they were needed"
        # Rows of eight bits are the pack's, not the model's.
        assert table["row_bytes"] == 16 + 2
    assert read_manifest(packed("qwen4_exp_text")).manifest.tables[0].row_bytes == 32


def test_verify_finds_a_block_that_was_changed(packed: Make, tmp_path: Path) -> None:
    copy = tmp_path / "pack"
    shutil.copytree(packed("qwen4_exp_text"), copy)
    assert verify(copy).damages == ()
    table = read_manifest(copy).manifest.tables[1]
    with (copy / table.file).open("r+b") as file:
        file.seek(table.offset + 2 * table.block_bytes + 5)
        file.write(b"?")
    (damage,) = verify(copy).damages
    assert damage.file == table.file
    first = 2 * table.rows_per_block
    assert (
        damage.reason == f"the checksums of 1 blocks are wrong, the first of rows from {first} on"
    )


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda piece: piece[:-3], r"has 893 rows of .*ngram_embedding\.weight in 3 tensors, and"),
        (lambda piece: piece[:, :-1].contiguous(), r"shard_1.* in the shape \[\d+, 15\]"),
        (lambda piece: piece.fill_(torch.nan), r"ngram_embedding\.shard_1\.weight holds NaN"),
    ],
)
def test_a_table_that_is_not_whole(
    saved: Make, tmp_path: Path, edit: Callable[[Tensor], Tensor], message: str
) -> None:
    copy = tmp_path / "checkpoint"
    shutil.copytree(saved("qwen4_exp_text"), copy)
    name = "model.layers.0.ple.ple_embedding.ngram_embedding.shard_1.weight"
    for file in copy.glob("*.safetensors"):
        tensors = load_file(file)
        if name in tensors:
            tensors[name] = edit(tensors[name])
            save_file(tensors, file, {"format": "pt"})
    request = Request(copy, tmp_path / "pack", choose_scheme("bf16"), optimize=False, table_bytes=1)
    with pytest.raises(CheckpointError, match=message):
        pack(request)
