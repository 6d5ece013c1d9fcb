"""What of stored weights cannot be kept, or is not as it should be, is told in a sentence."""

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from expertd.packing.checkpoint import Checkpoint
from expertd.packing.checkpoint_files import CheckpointTensor, Listing
from expertd.packing.default_scheme import default_scheme
from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd.packing.stored.description import METHODS, Description
from expertd.packing.stored.expected import expected_form
from expertd.packing.stored.finding import find_stored
from expertstore.errors import CheckpointError
from expertstore.pack.codec import dequantize, record_parts
from expertstore.pack.reader import PackReader
from expertstore.pack.tensor_file import TensorEntry
from tests.expert_store.packing.editing import edited, write_config, write_shards
from tests.stored_weights import ACTIVATION_ORDER, KINDS, make_stored

EXPERT = "model.layers.1.mlp.experts.5.up_proj"


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The checkpoint of a kind, made once."""
    made: dict[str, Path] = {}

    def make(name: str) -> Path:
        if name not in made:
            kind = KINDS.get(name, ACTIVATION_ORDER)
            made[name] = make_stored(tmp_path_factory.mktemp(name), kind)[0]
        return made[name]

    return make


Stored = Callable[[str], Path]


def repack(name: str, end: str, change: Callable[[Tensor], Tensor | None]) -> Any:
    """An edit of one piece of the expert."""

    def edit(tensors: dict[str, Tensor]) -> None:
        changed = change(tensors.pop(f"{EXPERT}.{end}"))
        if changed is not None:
            tensors[f"{EXPERT}.{end}"] = changed.contiguous()

    return name, edit


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (repack("ct-int4", "weight_scale", lambda _: None), rf"lacks {EXPERT}\.weight_scale;"),
        (repack("gptq", "qzeros", lambda _: None), rf"lacks {EXPERT}\.qzeros; download"),
        (repack("awq", "scales", lambda _: None), rf"lacks {EXPERT}\.scales; download"),
        (repack("ct-mxfp4", "weight_scale", lambda t: t[:, :3]), r"in the shape \[256, 3\], and"),
        (repack("ct-int4", "weight_scale", lambda t: t[:7]), r"_scale in the shape \[7, 4\], and"),
        (repack("awq", "qweight", lambda t: t[:, :9]), r"qweight in the shape \[128, 9\], and"),
        (repack("gptq", "scales", lambda t: t[:3]), r"groups do not divide the 128 inputs"),
        (repack("gptq", "qweight", lambda t: t[:8]), r"qzeros in the shape \[4, 32\], and"),
        (repack("ct-int4", "weight_scale", lambda t: t.half()), r"in several forms \(compressed"),
    ],
)  # fmt: skip
def test_damaged(damage: Any, message: str, stored: Stored, tmp_path: Path) -> None:
    path = edited(stored(damage[0]), tmp_path, damage[1])
    with pytest.raises(CheckpointError, match=message):
        pack(Request(path, tmp_path / "p", choose_scheme("as-is")))


@pytest.mark.parametrize(
    ("kind", "end", "value", "what"),
    [
        ("ct-int4", "weight_scale", float("inf"), "infinity"),
        ("gptq", "scales", float("nan"), "NaN"),
        ("ct-mxfp4", "weight_scale", 255, "NaN"),
    ],
)
def test_scales_that_are_no_numbers(
    kind: str, end: str, value: float, what: str, stored: Stored, tmp_path: Path
) -> None:
    path = edited(stored(kind), tmp_path, lambda t: t[f"{EXPERT}.{end}"].view(-1)[3].fill_(value))
    for scheme in ("as-is", "4bit", "bf16"):
        request = Request(path, tmp_path / scheme, choose_scheme(scheme), optimize=False)
        if scheme == "4bit" and kind == "ct-mxfp4":
            request = Request(path, tmp_path / scheme, choose_scheme("4bit", experts="8g32"))
        with pytest.raises(CheckpointError, match=rf"^{EXPERT}\.{end} holds {what}; mend"):
            pack(request)
    notices: list[str] = []
    request = Request(path, tmp_path / "forced", choose_scheme("as-is"), force=True)
    pack(request, on_notice=notices.append)
    assert notices == [f"{EXPERT}.{end} holds {what}; it is packed so (--force)."]


def test_activation_order_is_quantized_anew(tmp_path: Path) -> None:
    stored, plain = make_stored(tmp_path, ACTIVATION_ORDER)
    assert default_scheme(stored) == "as-is"
    with pytest.raises(
        CheckpointError, match=r"GPTQ\) .* activation order \(g_idx\); --scheme 4bit"
    ):
        pack(Request(stored, tmp_path / "p", choose_scheme("as-is")))
    pack(Request(stored, tmp_path / "p", choose_scheme("8bit"), optimize=False))
    name = "model.layers.1.mlp.experts.5.down_proj.weight"
    expected = load_file(plain / "model.safetensors")[name].float()
    with PackReader(tmp_path / "p") as reader:
        (layout,) = reader.manifest.layouts
        parts = record_parts(reader.read_record(1, 5), layout)
        found = dequantize(layout.matrix("down"), parts, torch.float32)
    assert (found - expected).norm() / expected.norm() < 0.01
    # That the configuration denies it does not go unseen.
    write_config(stored, quantization_config={**ACTIVATION_ORDER.config, "desc_act": False})
    with pytest.raises(CheckpointError, match=r"g_idx groups inputs by activation order, and"):
        pack(Request(stored, tmp_path / "q", choose_scheme("as-is")))


def test_what_the_configuration_says(stored: Stored, tmp_path: Path) -> None:
    path = tmp_path / "c"
    shutil.copytree(stored("awq"), path)
    write_config(path, quantization_config={"quant_method": "exotic"})
    with pytest.raises(
        CheckpointError, match=r"already quantized \(exotic\), in a way that is not"
    ):
        Checkpoint(path)
    write_config(path, quantization_config={"quant_method": "gptq"})
    notices: list[str] = []
    pack(Request(path, tmp_path / "p", choose_scheme("as-is")), on_notice=notices.append)
    assert "names a quantization (gptq), and its weights are in AWQ: they are" in notices[0]
    # Without a word in config.json, and with a tool's own file beside it.
    config = json.loads((path / "config.json").read_text())
    del config["quantization_config"]
    (path / "config.json").write_text(json.dumps(config))
    (path / "quantize_config.json").write_text(json.dumps({"bits": 4, "desc_act": False}))
    with Checkpoint(path) as checkpoint:
        assert checkpoint.disagrees == "gptq"
    (path / "quantize_config.json").unlink()
    with Checkpoint(path) as checkpoint:
        assert not checkpoint.disagrees
        assert checkpoint.stored_as == "AWQ"


ENDS = ("weight", "weight_packed", "weight_scale", "weight_scale_2", "weight_zero_point", "qweight",
        "weight_g_idx", "qzeros", "scales", "g_idx", "scale", "a_blocks", "a_scales")  # fmt: skip
JUNK: list[Any] = [None, 0, -1, 3, 4, 8, 1 << 40, "re:(", "Linear", [128, 128], [0], {}, [None]]


def test_nonsense_is_refused() -> None:
    """Names, types and shapes without sense, and configurations without, end in a sentence."""
    draw = random.Random(0)
    refused = []
    for _ in range(3000):
        tensors = [
            CheckpointTensor(
                Path("f"),
                TensorEntry(
                    f"m.{end}",
                    draw.choice(["U8", "I8", "I32", "F8_E4M3", "F8_E8M0", "F32", "F4"]),
                    tuple(draw.choices([0, 1, 2, 16, 32, 64, 3], k=draw.randint(0, 3))),
                    0,
                    64,
                ),
            )
            for end in draw.sample(ENDS, 5)
        ]
        weights = {key: draw.choice(JUNK) for key in ("num_bits", "type", "block_structure")}
        group = {"targets": draw.choice(JUNK), "weights": draw.choice([weights, *JUNK])}
        fields = {key: draw.choice(JUNK) for key in ("bits", "group_size", "ignore", "quant_algo")}
        fields["quant_method"] = draw.choice([*METHODS, 3])
        description = Description({**fields, "config_groups": draw.choice([{"a": group}, *JUNK])})
        expected_form(description, "layers.0.experts.down_proj", (64, 32))
        try:
            find_stored(Path("p"), Listing(tensors), description)
        except CheckpointError as error:
            refused.append(str(error))
    assert len(refused) > 1000
    assert all("; download the checkpoint again" in each or "; mend" in each for each in refused)


def test_pieces_in_different_files(stored: Stored, tmp_path: Path) -> None:
    """Scales, for example, in a file of their own."""
    source = stored("ct-int4-asymmetric")
    tensors = load_file(source / "model.safetensors")
    (tmp_path / "c").mkdir()
    shutil.copy(source / "config.json", tmp_path / "c")
    shards: dict[str, dict[str, Tensor]] = {"a.safetensors": {}, "b.safetensors": {}}
    for name, values in tensors.items():
        shards["ab"[name.endswith("scale")] + ".safetensors"][name] = values
    write_shards(tmp_path / "c", shards)
    for path, name in ((source, "p"), (tmp_path / "c", "q")):
        pack(Request(path, tmp_path / name, choose_scheme("as-is")))
    for file in ("experts-00000.safetensors", "trunk.safetensors"):
        assert (tmp_path / "p" / file).read_bytes() == (tmp_path / "q" / file).read_bytes()
    with Checkpoint(tmp_path / "c") as checkpoint:
        module = checkpoint.architecture.experts[0]
        assert {file.name for file in checkpoint.expert_files(module, 3)} == set(shards)
        attention = next(
            source for name, source in checkpoint.trunk if name.endswith("q_proj.weight")
        )
        assert {file.name for file in checkpoint.trunk_files(attention)} == set(shards)
