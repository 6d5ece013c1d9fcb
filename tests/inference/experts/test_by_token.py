"""Layers whose experts follow from tokens: what is known of them, and what the daemon is told."""

import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, DeepseekV4Config

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import choose_scheme
from expertd_client import Client
from expertd_inference.experts.by_token import TokenRouter, find_token_routers
from expertd_inference.process.attachment import attach
from expertd_inference.worker import Worker
from expertd_testing.daemon import serving
from expertd_testing.patience import HANG_SECONDS
from expertd_testing.tiny_models import VOCAB, byte_tokenizer, randomize

NUM_EXPERTS, LAYERS = 64, 3
TEXT = list(b"abracadabra")


def word_experts() -> Any:
    """Two layers by token, one by a router: as DeepSeek V4 begins."""
    config = DeepseekV4Config(
        vocab_size=VOCAB,
        hidden_size=64,
        moe_intermediate_size=32,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        head_dim=32,
        q_lora_rank=32,
        o_groups=2,
        o_lora_rank=32,
        num_experts_per_tok=2,
        n_routed_experts=NUM_EXPERTS,
        max_position_embeddings=256,
        layer_types=["sliding_attention"] * LAYERS,
        mlp_layer_types=["hash_moe", "hash_moe", "moe"],
        hc_mult=2,
        hc_sinkhorn_iters=2,
        bos_token_id=VOCAB - 1,
        eos_token_id=VOCAB - 1,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    randomize(model, seed=0)
    for layer in (0, 1):
        tokens = torch.arange(VOCAB)
        experts_of = torch.stack((tokens, 5 * tokens + 1), dim=1) % NUM_EXPERTS
        model.model.layers[layer].mlp.gate.tid2eid.copy_(experts_of)
    return model.bfloat16().eval()


def experts_of(text: list[int]) -> list[int]:
    return list(
        dict.fromkeys(e for t in text for e in (t % NUM_EXPERTS, (5 * t + 1) % NUM_EXPERTS))
    )


def test_a_step_s_tokens_tell_the_experts_of_the_layers_to_come() -> None:
    model = word_experts()
    modules: dict[int, nn.Module] = {
        layer: model.model.layers[layer].mlp.experts for layer in range(LAYERS)
    }
    routers = find_token_routers(model, modules)
    assert [*routers] == [0, 1], "layer 2 asks a router"
    hidden = torch.zeros(1, 64)
    assert routers[1].foreseen(hidden) == [], "before any step"
    with torch.no_grad():
        model(torch.tensor([TEXT]))
    assert sorted(routers[1].foreseen(hidden)) == sorted(experts_of(TEXT))
    commonest = ord("a") % NUM_EXPERTS, (5 * ord("a") + 1) % NUM_EXPERTS
    assert {*routers[1].likeliest(hidden, 2).tolist()} == {*commonest}
    with torch.no_grad():
        model(torch.tensor([[7]]))
    assert routers[0].chosen(hidden).tolist() == [[7, 36]]


def test_of_a_text_the_first_tokens_come_first() -> None:
    router = TokenRouter(torch.tensor([[3], [1], [3], [0]]), 4, None)  # type: ignore[arg-type]
    assert router.of_text([2, 3, 0, 1, 99, -1]) == [3, 0, 1], "what is no token has no experts"


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("words")
    word_experts().save_pretrained(folder / "checkpoint")
    byte_tokenizer().save_pretrained(folder / "checkpoint")
    pack(Request(folder / "checkpoint", folder / "pack", choose_scheme("bf16"), optimize=False))
    return folder / "pack"


def test_what_a_text_needs_is_read_when_it_arrives(packed: Path) -> None:
    with serving({"m": packed}, ram="8MiB") as daemon, Client(daemon.socket) as client:
        worker = Worker(attach("m", daemon.socket))
        try:
            wanted = [(layer, expert) for layer in (0, 1) for expert in experts_of(TEXT)]
            assert worker.session.absent(wanted) == wanted
            worker.expect(TEXT)
            deadline = time.monotonic() + HANG_SECONDS
            while worker.session.absent(wanted):
                assert time.monotonic() < deadline, "nothing was hinted at"
                time.sleep(0.01)
            known = client.stats()["models"][0]
            assert known["num_resident"] == len(wanted), "exactly these"
            with torch.no_grad():
                worker.model(torch.tensor([TEXT]))
            used = client.stats()["models"][0]
            assert used["prefetch"]["wasted"] == 0
            # The layer that asks a router may have been foreseen, too.
            assert used["prefetch"]["useful"] >= len(wanted)
        finally:
            worker.close()
