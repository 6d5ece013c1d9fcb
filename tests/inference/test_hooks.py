"""What of ours stands in transformers and torch, and that other models there do not notice it."""

import sys
from collections.abc import Callable, Iterator, Mapping
from types import FunctionType
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING

from expertd_inference.execution.batch import Batch, Span, Wanted
from expertd_inference.execution.choose import choose_for
from expertd_inference.execution.room import Room
from expertd_inference.kernels.cpu.linear import linear_kernels
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.model.native_linear import NativeLinear, use_native_linears
from expertd_inference.model.quantized_linear import QuantizedLinear
from expertd_testing.tiny_models import make_model
from tests.architectures.parity import load
from tests.inference.greedy import prompt_of

Make = Callable[..., Any]
HOOKS = {
    "AttentionInterface._global_mapping: expertd-eager",
    "AttentionInterface._global_mapping: expertd-sdpa",
    "AttentionInterface._global_mapping: expertd-witness",
    "AttentionMaskInterface._global_mapping: expertd-eager",
    "AttentionMaskInterface._global_mapping: expertd-sdpa",
    "ExpertsInterface._global_mapping: expertd",
    "AUTO_QUANTIZATION_CONFIG_MAPPING: expertd",
    "AUTO_QUANTIZER_MAPPING: expertd",
}
"""Attention's registration, the experts seam and the quantizer."""


def ours(value: object) -> bool:
    # Not isinstance, which asks objects that warn of being deprecated.
    kind: Any = value if issubclass(type(value), type | FunctionType) else type(value)
    return str(kind.__module__).startswith(("expertd", "expertstore"))


def hooks() -> Iterator[str]:
    """Where in the modules, classes and tables of transformers and torch something of ours is."""
    seen = set()
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").split(".")[0] not in ("transformers", "torch"):
            continue
        for name, value in list(vars(module).items()):
            if id(value) in seen:
                continue
            seen.add(id(value))
            if ours(value):
                yield f"{module.__name__}.{name}"
            inside: dict[str, Any] = {}
            if issubclass(type(value), type):
                inside = dict(vars(value))  # type: ignore[arg-type] # a class
            elif type(value) is dict:
                inside = {name: value}
            for attribute, part in inside.items():
                if ours(part):
                    yield f"{module.__name__}.{name}.{attribute}"
                if type(part) is dict and part is not sys.modules:
                    prefix = name if part is value else f"{name}.{attribute}"
                    yield from (f"{prefix}: {key}" for key, each in part.items() if ours(each))


def compute(model: Any, tokens: list[int]) -> tuple[Tensor, Mapping[str, Tensor]]:
    """Logits, and the gradients of their sum."""
    model.zero_grad()
    logits = model(torch.tensor([tokens])).logits
    logits.sum().backward()
    gradients = {
        name: parameter.grad.clone()
        for name, parameter in model.named_parameters()
        if parameter.grad is not None
    }
    return logits.detach(), gradients


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss"])
def test_another_model_notices_nothing(architecture: str, packed: Make) -> None:
    bystander = make_model(architecture, dtype=torch.float32).requires_grad_(True)
    # A token alone is what native code computes, and a few are what torch does.
    texts = [[5], prompt_of(9)]
    before = [compute(bystander, text) for text in texts]
    model = load(packed(architecture, "4bit-fast"), kernels=NativeKernels())
    if (kernels := linear_kernels()) is not None:
        use_native_linears(model, kernels)
    executor = choose_for(model, Room(2, 2, 16), say=lambda _: None)
    assert executor.name == "modules"
    executor.forward(Batch((Span(0, texts[1], 0, [0], 0, Wanted.LAST),)))
    assert set(hooks()) == HOOKS
    for text, (logits, gradients) in zip(texts, before, strict=True):
        now, now_gradients = compute(bystander, text)
        assert torch.equal(now, logits)
        assert any("q_proj" in name for name in gradients)
        assert now_gradients.keys() == gradients.keys()
        assert all(torch.equal(now_gradients[name], gradients[name]) for name in gradients)


@pytest.mark.parametrize("exact", [False, True])
def test_our_own_model_keeps_its_classes_and_gives_gradients(exact: bool, packed: Make) -> None:
    model = load(packed("qwen3_moe", "4bit-fast"), kernels=NativeKernels(exact=exact))
    names = list(model.state_dict())
    if (kernels := linear_kernels(exact=exact)) is not None:
        use_native_linears(model, kernels)
    executor = choose_for(model, Room(2, 2, 16), say=lambda _: None, exact=exact)
    executor.forward(Batch((Span(0, [5], 0, [0], 0, Wanted.LAST),)))
    assert {type(module) for module in model.modules() if ours(module)} <= {
        QuantizedLinear,
        NativeLinear,
    }
    assert list(model.state_dict()) == names
    entered = model.get_input_embeddings()(torch.tensor([[5]])).requires_grad_(True)
    (gradient,) = torch.autograd.grad(model(inputs_embeds=entered).logits.sum(), entered)
    assert gradient.count_nonzero() > gradient.numel() / 2


def test_a_hook_would_be_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers.models.mixtral import modeling_mixtral

    monkeypatch.setattr(modeling_mixtral, "apply_rotary_pos_emb", use_native_linears)
    monkeypatch.setattr(modeling_mixtral.MixtralModel, "forward", use_native_linears)
    monkeypatch.setattr(torch.nn.Linear, "forward", use_native_linears)
    name = modeling_mixtral.__name__
    assert {
        f"{name}.apply_rotary_pos_emb",
        f"{name}.MixtralModel.forward",
    } <= set(hooks())
    assert any(hook.endswith("Linear.forward") for hook in hooks())
    assert AUTO_QUANTIZER_MAPPING.keys() >= {"expertd"} <= AUTO_QUANTIZATION_CONFIG_MAPPING.keys()
