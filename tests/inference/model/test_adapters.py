"""Adapters give peft's logits, each row its own, and leave the others' bits alone."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.choose import choose_for
from expertd_inference.execution.executor import Executor
from expertd_inference.execution.room import Room
from expertd_inference.execution.turns import TurnsExecutor
from expertd_inference.experts.adapting import Adapter
from expertd_inference.experts.cpu import connect
from expertd_inference.experts.recovery import Recovery
from expertd_inference.kernels.cpu.choice import ReferenceKernels
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.model.adapters import Adapters
from expertd_inference.model.loading import load_trunk
from expertd_testing.adapters import make_adapter
from expertd_testing.tiny_models import make_model
from expertstore.errors import AdapterError
from tests.inference.greedy import prompt_of
from tests.inference.pack_source import PackSource

Make = Callable[..., Any]

# peft asks a model of transformers by a name that is going to change.
pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

ROOM = Room(num_blocks=8, num_sequences=4, num_rows=64)
PROMPTS = [prompt_of(7, seed=seed) for seed in range(4)]
NEW = [7, 200]
CONFIGS: dict[str, dict[str, Any]] = {
    "plain": {"target_modules": ["q_proj", "v_proj"], "r": 4, "lora_alpha": 16},
    "patterns": {
        "target_modules": ["q_proj", "k_proj", "o_proj"],
        "r": 4,
        "lora_alpha": 8,
        "use_rslora": True,
        "rank_pattern": {"o_proj": 2},
        "alpha_pattern": {"layers.1.self_attn.q_proj": 32},
    },
    "experts": {
        "target_modules": ["v_proj"],
        "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
        "r": 2,
        "lora_alpha": 8,
    },
}
WAYS = ["modules", "exact", "turns", *(["program"] if native_library().library else [])]


@pytest.fixture(scope="module")
def saved(checkpoint: Make, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random adapters of a tiny model, as peft saves them."""
    found = {}
    for number, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(number)
        base = AutoModelForCausalLM.from_pretrained(checkpoint("mixtral"), dtype=torch.float32)
        model = get_peft_model(base, LoraConfig(**config))
        with torch.no_grad():
            for parameter_name, parameter in model.named_parameters():
                if "lora_" in parameter_name:
                    parameter.normal_(std=0.2)
        found[name] = tmp_path_factory.mktemp("adapter") / name
        model.save_pretrained(found[name])
    return found


def model_of(pack: Path, kernels: Any) -> Any:
    source = PackSource(pack)
    linear = kernels.linear if isinstance(kernels, NativeKernels) else None
    trunk = load_trunk(source.pack, source.manifest, dtype=torch.float32, linear=linear)
    recovery = Recovery(source, reattach_seconds=1.0, say=lambda _: None)
    connect(trunk.experts, source.manifest, source, recovery, kernels)
    return trunk.model


def executor_of(way: str, pack: Path) -> tuple[Executor, Adapters]:
    kernels = NativeKernels() if way == "program" else ReferenceKernels()
    model = model_of(pack, kernels)
    if way == "turns":
        return TurnsExecutor(model, "asked for"), Adapters(model)
    exact = way == "exact"
    native = kernels if isinstance(kernels, NativeKernels) else None
    executor = choose_for(model, ROOM, print, exact=exact, kernels=native)
    assert executor.name == ("program" if way == "program" else "modules")
    return executor, Adapters(model, exact=exact)


def decode(executor: Executor, adapters: Sequence[Adapter | None]) -> list[list[Tensor]]:
    """The logits after the prompts, and after each new token, by sequence; None is the base."""
    found: list[list[Tensor]] = [[] for _ in adapters]
    for step in range(len(NEW) + 1):
        spans = []
        for one, adapter in enumerate(adapters):
            tokens = [NEW[step - 1]] if step else PROMPTS[one]
            position = len(PROMPTS[one]) + step - 1 if step else 0
            spans.append(Span(one, tokens, position, [one], one, Wanted.LAST, adapter=adapter))
        batches = [spans] if executor.fits(Batch(tuple(spans))) else [[span] for span in spans]
        logits = torch.cat([executor.forward(Batch(tuple(each))).clone() for each in batches])
        for one in range(len(adapters)):
            found[one].append(logits[one])
    return found


@pytest.fixture(scope="module")
def expected(checkpoint: Make, saved: dict[str, Path]) -> dict[str | None, list[list[Tensor]]]:
    """Peft's logits of each prompt, by adapter."""
    found: dict[str | None, list[list[Tensor]]] = {}
    for name in (None, *saved):
        model: Any = AutoModelForCausalLM.from_pretrained(
            checkpoint("mixtral"), dtype=torch.float32
        )
        if name is not None:
            model = PeftModel.from_pretrained(model, saved[name])
        with torch.no_grad():
            logits = [model(torch.tensor([prompt + NEW])).logits[0] for prompt in PROMPTS]
        found[name] = [[*each[len(PROMPTS[0]) - 1 :]] for each in logits]
    return found


@pytest.mark.parametrize("way", WAYS)
def test_the_rows_of_a_step_have_their_own_adapters(
    way: str, packed: Make, saved: dict[str, Path], expected: dict[str | None, Any]
) -> None:
    executor, adapters = executor_of(way, packed("mixtral"))
    alone = decode(executor, [None])[0]
    names = [None, "plain", "patterns", "experts"]
    opened = [None if name is None else adapters.open(str(saved[name])) for name in names]
    assert opened[1] is adapters.open(str(saved["plain"])), "opened once"
    found = decode(executor, opened)
    for one, name in enumerate(names):
        for ours, theirs in zip(found[one], expected[name][one], strict=True):
            assert torch.allclose(ours, theirs, atol=2e-3)
    assert not torch.allclose(found[1][0], expected[None][1][0], atol=0.1), "it says little"
    if way in ("exact", "program"):
        assert all(map(torch.equal, found[0], alone)), "the base's bits are its own"
    if way == "exact":
        for one in (2, 3):
            others = [None] * one
            assert all(map(torch.equal, found[one], decode(executor, [*others, opened[one]])[one]))
    assert all(map(torch.equal, alone, decode(executor, [None])[0])), "and nothing is left behind"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"peft_type": "IA3"}, "is of peft's type IA3, and only LORA is known here"),
        ({"use_dora": True}, "has DoRA, which is not known here"),
        ({"modules_to_save": ["lm_head"]}, "has whole modules"),
        ({"bias": "all"}, "has biases"),
        ({"init_lora_weights": "pissa_niter_4"}, "began with pissa_niter_4, which changes the"),
        ({"r": 3}, "of rank 4, and its adapter_config.json says 3"),
        ({"lora_alpha": "much"}, "has lora_alpha 'much'; give a number"),
        (None, "adapter_config.json cannot be read"),
    ],
)
def test_what_is_no_adapter_that_is_known(
    changes: dict[str, Any] | None, said: str, saved: dict[str, Path], tmp_path: Path
) -> None:
    weights = (saved["plain"] / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights)
    config = json.loads((saved["plain"] / "adapter_config.json").read_text())
    if changes is not None:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | changes))
    with pytest.raises(AdapterError, match=said) as caught:
        Adapters(torch.nn.Identity()).open(str(tmp_path))
    assert "\n" not in str(caught.value)


def test_an_adapter_of_another_base(saved: dict[str, Path]) -> None:
    for architecture, size, said in (
        (
            "mixtral",
            64,
            "is of another base: model.layers.0.self_attn.q_proj has 128 inputs and 128",
        ),
        ("deepseek_v3", 128, "_proj, which is no linear layer of this model; it was trained on"),
    ):
        model = make_model(architecture, hidden_size=size)
        with pytest.raises(AdapterError, match=said):
            Adapters(model).open(str(saved["plain"]))


def test_experts_by_their_own_names(checkpoint: Make, packed: Make, tmp_path: Path) -> None:
    """As an adapter has them that was trained where experts are modules."""
    inner, hidden = 256, 128
    shapes = {"w1": (inner, hidden), "w3": (inner, hidden), "w2": (hidden, inner)}
    names = {
        f"model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}": shape
        for name, shape in shapes.items()
        for layer in range(3)
        for expert in range(0, 8, 2)
    }
    path = make_adapter(tmp_path / "a", names, std=0.2)
    model = AutoModelForCausalLM.from_pretrained(checkpoint("mixtral"), dtype=torch.float32)
    weights = load_file(path / "adapter_model.safetensors")
    for name in names:
        a, b = (weights[f"base_model.model.{name}.lora_{letter}.weight"] for letter in "AB")
        _, _, layer, _, _, expert, matrix = name.split(".")
        experts = model.model.layers[int(layer)].mlp.experts
        place = {"w1": slice(0, inner), "w3": slice(inner, None), "w2": slice(None)}[matrix]
        parameter = experts.down_proj if matrix == "w2" else experts.gate_up_proj
        parameter.data[int(expert), place] += 2 * b @ a
    executor, adapters = executor_of(WAYS[-1], packed("mixtral"))
    found = decode(executor, [None, adapters.open(str(path))])[1]
    with torch.no_grad():
        expected = model(torch.tensor([PROMPTS[1] + NEW])).logits[0]
    for ours, theirs in zip(found, expected[len(PROMPTS[1]) - 1 :], strict=True):
        assert torch.allclose(ours, theirs, atol=2e-3)
    wrong = make_adapter(tmp_path / "b", {"model.layers.1.mlp.experts.8.w1": (inner, hidden)})
    with pytest.raises(AdapterError, match="a layer has 8 experts in this model"):
        adapters.open(str(wrong))
    wide = make_adapter(tmp_path / "c", {"model.layers.1.mlp.experts.7.w2": (hidden, 64)})
    with pytest.raises(AdapterError, match="such a matrix has 256 inputs and 128 outputs"):
        adapters.open(str(wide))
