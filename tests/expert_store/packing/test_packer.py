"""Packs: what is in them is what was in the checkpoint, where the manifest says, or nowhere."""

import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertd.packing import packer
from expertd.packing.journal import Journal
from expertd.packing.packer import Progress, Request, pack
from expertd.packing.schemes import SCHEMES, choose_scheme
from expertd_testing.tiny_models import CONFIGS, make_checkpoint, make_model, save_model
from expertstore.errors import CheckpointError, PackError
from expertstore.pack.codec import dequantize, record_parts
from expertstore.pack.inspect import inspect
from expertstore.pack.layout import Encoding
from expertstore.pack.manifest import Manifest
from expertstore.pack.reader import PackReader
from expertstore.pack.tensor_file import read_header
from expertstore.pack.verify import verify
from tests.expert_store.packing.conftest import MakeCheckpoint

# Relative error of normal weights (see test_quantizer), without the solver.
ERRORS = {"8bit": 0.0061, "4bit": 0.091, "paper-3bit": 0.197, "paper-2bit": 0.332}


def stock_state(path: Path) -> dict[str, torch.Tensor]:
    state: dict[str, torch.Tensor] = AutoModelForCausalLM.from_pretrained(
        path, dtype=torch.bfloat16
    ).state_dict()
    return state


def stock_expert(state: dict[str, torch.Tensor], name: str, expert: int) -> dict[str, Any]:
    """An experts module's tensors for one expert, in the order of a record."""
    gate_up = state[f"{name}.gate_up_proj"][expert]
    down = state[f"{name}.down_proj"][expert]
    if f"{name}.gate_up_proj_bias" not in state:
        return {"gate_up": gate_up, "down": down}
    bias = state[f"{name}.gate_up_proj_bias"][expert]
    return {
        "gate_up": torch.cat((gate_up.T[0::2], gate_up.T[1::2])),
        "down": down.T,
        "gate_up.bias": torch.cat((bias[0::2], bias[1::2])),
        "down.bias": state[f"{name}.down_proj_bias"][expert],
    }


def experts_name(state: dict[str, torch.Tensor], layer: int) -> str:
    (name,) = [name for name in state if f".{layer}." in name and name.endswith(".gate_up_proj")]
    return name.removesuffix(".gate_up_proj")


def trunk_parts(manifest: Manifest, trunk: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The trunk's tensors under the checkpoint's names, dequantized to float32."""
    found = dict(trunk)
    for tensor in manifest.trunk_quantized:
        parts = {name: found.pop(name) for name in trunk if name.startswith(f"{tensor.name}.")}
        found[tensor.name] = dequantize(tensor.matrix, parts, torch.float32)
    return found


@pytest.mark.parametrize("architecture", CONFIGS)
def test_an_unquantized_pack_is_the_checkpoint(
    architecture: str, checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    source = checkpoint_of(architecture)
    pack(Request(source, tmp_path / "pack", choose_scheme("bf16")))
    state, original = stock_state(source), load_file(source / "model.safetensors")
    with PackReader(tmp_path / "pack") as reader:
        for place in reader.places():
            layer = next(x for x in reader.manifest.layers if x.layer == place.layer)
            layout = reader.manifest.layouts[layer.layout]
            parts = record_parts(reader.read_record(place.layer, place.expert), layout)
            stock = stock_expert(state, experts_name(state, place.layer), place.expert)
            for name, values in stock.items():
                part = name if name.endswith(".bias") else f"{name}.weight"
                assert torch.equal(parts.pop(part), values)
            assert not parts
    trunk = load_file(tmp_path / "pack/trunk.safetensors")
    assert trunk
    assert all(torch.equal(values, original[name]) for name, values in trunk.items())
    left = set(original) - set(trunk)
    assert left
    assert all("expert" in name or "block_sparse_moe" in name for name in left)


@pytest.mark.parametrize("scheme", ERRORS)
@pytest.mark.parametrize("architecture", ["mixtral", "gpt_oss", "deepseek_v3"])
def test_a_quantized_pack_is_near_the_checkpoint(
    architecture: str, scheme: str, checkpoint_of: MakeCheckpoint, tmp_path: Path
) -> None:
    source = checkpoint_of(architecture)
    pack(Request(source, tmp_path / "pack", choose_scheme(scheme), optimize=False))
    state, original = stock_state(source), load_file(source / "model.safetensors")
    with PackReader(tmp_path / "pack") as reader:
        manifest = reader.manifest
        for place in list(reader.places())[::5]:
            layout = manifest.layouts[0]
            parts = record_parts(reader.read_record(place.layer, place.expert), layout)
            stock = stock_expert(state, experts_name(state, place.layer), place.expert)
            for matrix in layout.matrices:
                weight = dequantize(matrix, parts, torch.float32)
                expected = stock[matrix.name].float()
                assert (weight - expected).norm() < ERRORS[scheme] * expected.norm()
                if "gate_up.bias" in stock:
                    assert torch.equal(parts[f"{matrix.name}.bias"], stock[f"{matrix.name}.bias"])
    assert manifest.scheme == scheme
    quantized = {tensor.name for tensor in manifest.trunk_quantized}
    assert quantized
    has_dense = architecture == "deepseek_v3" and not scheme.startswith("paper")
    assert any(".mlp." in name for name in quantized) is has_dense
    assert all(name.endswith("proj.weight") or "kv_a_proj" in name for name in quantized)
    bound = ERRORS["8bit" if SCHEMES[scheme].attention.bits == 8 else "4bit"]
    trunk = trunk_parts(manifest, load_file(tmp_path / "pack/trunk.safetensors"))
    for name, values in trunk.items():
        if name in quantized:
            expected = original[name].float()
            assert (values - expected).norm() < bound * expected.norm()
        else:
            assert torch.equal(values, original[name])


def test_a_slow_solver_is_said_once(
    tmp_path: Path, checkpoint_of: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("EXPERTD_NATIVE", "0")
    notices: list[str] = []
    for name, attention, optimize in (("a", "8g64", True), ("b", "8g64", False), ("c", "16", True)):
        scheme = choose_scheme("bf16", attention=attention)
        request = Request(checkpoint_of("mixtral"), tmp_path / name, scheme, optimize=optimize)
        pack(request, on_notice=notices.append)
    assert len(notices) == 1
    assert "so hqq's solver runs" in notices[0]


def quantized_in(pack: Path) -> set[str]:
    with PackReader(pack) as reader:
        return {tensor.name for tensor in reader.manifest.trunk_quantized}


def test_dense_layers_and_the_head_have_precisions(tmp_path: Path) -> None:
    """Of Qwen2-MoE: a dense layer, shared experts whose gates have one row, and its head."""
    make_checkpoint("qwen2_moe", tmp_path / "source", vocab_size=264)
    scheme = choose_scheme("4bit-fast", attention="16")
    notices: list[str] = []
    pack(
        Request(tmp_path / "source", tmp_path / "pack", scheme, optimize=False),
        on_notice=notices.append,
    )
    leaves = {"gate_proj", "up_proj", "down_proj"}
    assert quantized_in(tmp_path / "pack") == {
        "lm_head.weight",
        *(f"model.layers.1.mlp.{leaf}.weight" for leaf in leaves),
        *(f"model.layers.{n}.mlp.shared_expert.{leaf}.weight" for n in (0, 2) for leaf in leaves),
    }
    assert not notices
    assert not verify(tmp_path / "pack").damages


def test_a_head_of_an_odd_size_stays_as_it_is(
    tmp_path: Path, checkpoint_of: MakeCheckpoint
) -> None:
    """257 rows: 8 bits can, 4 bits cannot, and both the packing and the inspection say so."""
    notices: list[str] = []
    for text in ("4g64", "8g128"):
        scheme = choose_scheme("bf16", head=text)
        request = Request(checkpoint_of("mixtral"), tmp_path / text, scheme, optimize=False)
        pack(request, on_notice=notices.append)
    assert notices == [
        "lm_head.weight has 257 rows, and 4 bits need a multiple of 2: it stays in 16 bits."
    ]
    assert not quantized_in(tmp_path / "4g64")
    assert quantized_in(tmp_path / "8g128") == {"lm_head.weight"}
    assert "lm_head.weight" in {entry.name for entry in inspect(tmp_path / "4g64").trunk_plain}
    assert "lm_head.weight" not in {entry.name for entry in inspect(tmp_path / "8g128").trunk_plain}


@pytest.mark.parametrize("scheme", ["bf16", "paper-2bit"])
def test_records_lie_on_pages(scheme: str, checkpoint_of: MakeCheckpoint, tmp_path: Path) -> None:
    """Several files; the safetensors package finds the same records in them."""
    request = Request(
        checkpoint_of("mixtral"), tmp_path / "pack", choose_scheme(scheme), optimize=False,
        max_file_bytes=1_000_000,
    )  # fmt: skip
    pack(request)
    assert not verify(tmp_path / "pack").damages
    with PackReader(tmp_path / "pack") as reader:
        assert len(reader.manifest.files) == (5 if scheme == "bf16" else 1)
        tensors: dict[str, torch.Tensor] = {}
        for file in reader.manifest.files:
            path = tmp_path / "pack" / file.name
            assert path.stat().st_size == file.num_bytes <= 1_000_000 + 4096
            tensors |= load_file(path)
        assert len(tensors) == reader.manifest.num_experts == 24
        for place in reader.places():
            assert place.offset % 4096 == place.num_bytes % 4096 == 0
            record = tensors[f"layers.{place.layer}.experts.{place.expert}"]
            assert record.dtype == torch.uint8
            assert record.numpy().tobytes() == reader.read_record(place.layer, place.expert)
        for layout in reader.manifest.layouts:
            assert all(part.offset % 64 == 0 for part in layout.parts)
            encoding = Encoding.PLAIN if scheme == "bf16" else Encoding.HQQ
            assert {matrix.encoding for matrix in layout.matrices} == {encoding}


def test_trunk_tensors_are_aligned(tmp_path: Path) -> None:
    """A router of 9 experts has an odd number of 16-bit biases; a float32 tensor comes later."""
    model = make_model("gpt_oss", num_local_experts=9, num_hidden_layers=2)
    model.model.layers[0].self_attn.sinks.data = torch.ones(4)
    save_model(model, tmp_path / "source")
    request = Request(tmp_path / "source", tmp_path / "pack", choose_scheme("4bit"), optimize=False)
    pack(request)
    sizes = {"F32": 4, "BF16": 2, "F16": 2, "U8": 1}
    tensors = read_header(tmp_path / "pack/trunk.safetensors")
    assert tensors["model.layers.0.self_attn.sinks"].dtype == "F32"
    for entry in tensors.values():
        assert entry.offset % sizes[entry.dtype] == 0


def test_the_journal_never_runs_ahead_of_the_disk(
    tmp_path: Path, checkpoint_of: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What a power failure leaves: each commit comes after its files were flushed."""
    unflushed: set[int] = set()
    commits = []
    write, fdatasync, commit = packer._write, os.fdatasync, Journal.commit

    def on_write(fd: int, data: memoryview, offset: int) -> None:
        unflushed.add(fd)
        write(fd, data, offset)

    def on_flush(fd: int) -> None:
        unflushed.discard(fd)
        fdatasync(fd)

    def on_commit(journal: Journal) -> list[int]:
        assert not unflushed
        commits.append(len(journal.done))
        return commit(journal)

    monkeypatch.setattr(packer, "_write", on_write)
    monkeypatch.setattr(os, "fdatasync", on_flush)
    monkeypatch.setattr(Journal, "commit", on_commit)
    monkeypatch.setattr(packer, "COMMIT_SECONDS", 0.0)
    pack(Request(checkpoint_of("mixtral"), tmp_path / "pack", choose_scheme("bf16")))
    assert commits == [*range(1, 49), 48]


@pytest.mark.parametrize("has_both", [False, True])
def test_tied_embeddings(has_both: bool, tmp_path: Path) -> None:
    """A head that is the embeddings is not quantized, also where the checkpoint has it twice."""
    make_checkpoint("mixtral", tmp_path / "tied", tie_word_embeddings=True, num_hidden_layers=1)
    if has_both:
        tensors = load_file(tmp_path / "tied/model.safetensors")
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
        save_file(tensors, tmp_path / "tied/model.safetensors", {"format": "pt"})
    pack(Request(tmp_path / "tied", tmp_path / "pack", choose_scheme("bf16", head="8g128")))
    assert not quantized_in(tmp_path / "pack")
    trunk = load_file(tmp_path / "pack/trunk.safetensors")
    assert ("lm_head.weight" in trunk) is has_both
    assert "model.embed_tokens.weight" in trunk


def test_shards_and_one_file_give_one_pack(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    sharded = make_checkpoint("mixtral", tmp_path / "sharded", max_shard_size="600KB")
    for name, source in (("one", checkpoint_of("mixtral")), ("other", sharded)):
        pack(Request(source, tmp_path / name, choose_scheme("4bit"), optimize=False))
    for name in ("pack.json", "experts-00000.safetensors", "trunk.safetensors"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "other" / name).read_bytes()


def test_a_pack_brings_configuration_and_tokenizer(
    tmp_path: Path, checkpoint_of: MakeCheckpoint
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint_of("mixtral"), source)
    (source / "LICENSE").write_text("free")
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates/tool.jinja").write_text("{{ tools }}")
    (source / "optimizer.pt").write_text("not to be copied")
    pack(Request(source, tmp_path / "pack", choose_scheme("bf16")))
    names = [str(file.relative_to(tmp_path / "pack")) for file in (tmp_path / "pack").rglob("*.*")]
    assert sorted(names) == [
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "experts-00000.safetensors",
        "generation_config.json",
        "pack.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "trunk.safetensors",
    ]  # fmt: skip
    assert (tmp_path / "pack/LICENSE").read_text() == "free"
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "pack")
    assert tokenizer.decode(tokenizer("Grüße").input_ids) == "Grüße"
    umask = os.umask(0o022)
    os.umask(umask)
    assert (tmp_path / "pack/pack.json").stat().st_mode & 0o777 == 0o666 & ~umask


def test_progress_counts_every_step(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    seen: list[Progress] = []
    request = Request(checkpoint_of("mixtral"), tmp_path / "pack", choose_scheme("bf16"))
    pack(request, on_progress=seen.append)
    assert [progress.done_steps for progress in seen] == list(range(seen[-1].total_steps + 1))
    assert seen[0].done_bytes == 0
    assert seen[-1].done_bytes == seen[-1].total_bytes
    size = (checkpoint_of("mixtral") / "model.safetensors").stat().st_size
    assert 0.98 * size < seen[-1].total_bytes <= size


def test_what_is_there_is_not_overwritten(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    destination = tmp_path / "pack"
    request = Request(checkpoint_of("mixtral"), destination, choose_scheme("bf16"))
    pack(request)
    with pytest.raises(PackError, match="exists already; give --force to replace it"):
        pack(request)
    (destination / "mine").touch()
    pack(Request(request.source, destination, choose_scheme("4bit"), optimize=False, force=True))
    with PackReader(destination) as reader:
        assert reader.manifest.scheme == "4bit"
    assert not (destination / "mine").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["pack"]


def test_force_replaces_only_packs(tmp_path: Path, checkpoint_of: MakeCheckpoint) -> None:
    home = tmp_path / "home"
    home.mkdir()
    (home / "letters").write_text("dear")
    request = Request(checkpoint_of("mixtral"), home, choose_scheme("bf16"), force=True)
    with pytest.raises(PackError, match="is not a pack; --force replaces only packs"):
        pack(request)
    partial = tmp_path / "new.partial"
    partial.mkdir()
    (partial / "letters").write_text("dear")
    with pytest.raises(PackError, match="holds other files; move them"):
        pack(Request(request.source, tmp_path / "new", choose_scheme("bf16")))
    assert (partial / "letters").exists()
    assert (home / "letters").exists()


def test_a_full_disk_is_met_before_the_work(
    tmp_path: Path, checkpoint_of: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    def no_space(fd: int, offset: int, length: int) -> None:
        raise OSError(28, os.strerror(28))

    request = Request(checkpoint_of("mixtral"), tmp_path / "pack", choose_scheme("bf16"))
    with monkeypatch.context() as context:
        context.setattr(os, "posix_fallocate", no_space)
        with pytest.raises(PackError, match=r"The disk of .* is full: the pack needs 0.00 GiB"):
            pack(request)
    assert not request.destination.exists()
    pack(request)


def test_a_write_error_keeps_what_is_done(
    tmp_path: Path, checkpoint_of: MakeCheckpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = packer._write
    written: list[int] = []

    def failing(fd: int, data: memoryview, offset: int) -> None:
        if len(written) == 30:
            raise OSError(5, os.strerror(5))
        written.append(offset)
        write(fd, data, offset)

    request = Request(checkpoint_of("mixtral"), tmp_path / "pack", choose_scheme("bf16"))
    with monkeypatch.context() as context:
        context.setattr(packer, "_write", failing)
        with pytest.raises(PackError, match="cannot be written: Input/output error"):
            pack(request)
    notices: list[str] = []
    pack(request, on_notice=notices.append)
    assert notices == ["Going on after 30 of 48 steps."]


def test_a_source_that_goes_bad_keeps_what_is_done(
    tmp_path: Path, checkpoint_of: MakeCheckpoint
) -> None:
    source = tmp_path / "source"
    shutil.copytree(checkpoint_of("mixtral"), source)
    request = Request(source, tmp_path / "pack", choose_scheme("bf16"))

    def truncate(progress: Progress) -> None:
        if progress.done_steps == 3:
            os.truncate(source / "model.safetensors", 4_000_000)

    with pytest.raises(CheckpointError, match=r"is truncated: .* \d+ of 48 steps are done and"):
        pack(request, on_progress=truncate)
    assert not request.destination.exists()
