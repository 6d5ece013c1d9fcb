"""Where the trunk goes on several devices."""

from expertd_inference.device.trunk_map import trunk_map

MODULES = [
    "model.embed_tokens",
    *(
        f"model.layers.{layer}.{part}"
        for layer in range(6)
        for part in ("self_attn.q_proj", "mlp.gate", "input_layernorm")
    ),
    "model.norm",
    "model.rotary_emb",
    "lm_head",
]


def test_one_device_takes_all() -> None:
    assert trunk_map(MODULES, {1: "cuda:0", 2: "cuda:0"}) == {"": "cuda:0"}


def test_layers_go_where_their_experts_are() -> None:
    # Layer 0 is dense, and so is 4.
    placed = {1: "cuda:1", 2: "cuda:1", 3: "cuda:0", 5: "cuda:2"}
    assert trunk_map(MODULES, placed) == {
        "model.embed_tokens": "cuda:1",
        "model.layers.0": "cuda:1",
        "model.layers.1": "cuda:1",
        "model.layers.2": "cuda:1",
        "model.layers.3": "cuda:0",
        "model.layers.4": "cuda:0",
        "model.layers.5": "cuda:2",
        "model.norm": "cuda:2",
        "model.rotary_emb": "cuda:2",
        "lm_head": "cuda:2",
    }
