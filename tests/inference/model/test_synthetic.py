"""Synthetic packs are packs, and what they compute stays sane."""

from pathlib import Path

import pytest
import torch

from bench import synthetic
from expertd.packing.schemes import choose_scheme
from expertd_inference import load_model
from expertd_testing.daemon import serving
from expertstore.pack.reader import PackReader

NUM_EXPERTS = ("num_experts", "num_local_experts")

TINY = {"hidden_size": 128, "intermediate_size": 256, "moe_intermediate_size": 128, "head_dim": 32,
        "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": 256}  # fmt: skip


@pytest.mark.parametrize(
    ("shape", "scheme", "distinct"),
    [
        ("mixtral-8x7b", "bf16", 8),
        ("qwen3-30b-a3b", "paper-2bit", 3),
        ("olmoe-1b-7b", "4bit-fast", None),
        ("gpt-oss-120b", "4bit", 1),
    ],
)
def test_a_synthetic_pack_is_a_pack(
    shape: str, scheme: str, distinct: int | None, tmp_path: Path
) -> None:
    path = synthetic.make_pack(
        tmp_path / "pack", shape, scheme, 2, distinct_records=distinct, overrides=TINY
    )
    with PackReader(path) as reader:
        places = list(reader.places())
        for place in places:
            reader.read_record(place.layer, place.expert)
    per_layer = len(places) // 2
    assert per_layer == max(synthetic.SHAPES[shape].get(key, 0) for key in NUM_EXPERTS)
    assert len({place.offset for place in places}) == (distinct or len(places))
    with serving({"m": path}, ram=64 << 20) as daemon:
        model = load_model("m", socket=daemon.socket)
        logits = model(torch.randint(256, (1, 32))).logits
        assert 0.5 < logits.float().std() < 2, "what enters the head has unit variance"
        model.expertd.close()


def test_a_layout_can_be_asked_for_without_a_pack() -> None:
    *experts, trunk = synthetic.plan_of("mixtral-8x7b", choose_scheme("bf16")).files
    num_bytes = 2 * 32 * 8 * 3 * 4096 * 14336
    assert sum(file.num_bytes for file in experts) == pytest.approx(num_bytes, rel=1e-5)
    assert sum(file.num_bytes for file in (*experts, trunk)) == pytest.approx(93.4e9, rel=1e-3)
