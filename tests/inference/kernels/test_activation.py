"""Which activation a model has, told by what its own function does."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers.activations import ACT2FN
from transformers.integrations.moe import _default_apply_gate
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssExperts

from expertd_inference.kernels.activation import Activation, ActivationKind, activation_of


class Experts(nn.Module):
    _apply_gate: Any = _default_apply_gate

    def __init__(self, function: nn.Module, *, has_gate: bool = True) -> None:
        super().__init__()
        self.act_fn = function
        self.has_gate = has_gate


class OwnGate(Experts):
    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate).clamp(max=7) * up


FORMULAS = {
    ActivationKind.SILU: functional.silu,
    ActivationKind.GELU: functional.gelu,
    ActivationKind.GELU_TANH: lambda gate: functional.gelu(gate, approximate="tanh"),
    ActivationKind.RELU: functional.relu,
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("silu", ActivationKind.SILU),
        ("swish", ActivationKind.SILU),
        ("gelu", ActivationKind.GELU),
        ("gelu_pytorch_tanh", ActivationKind.GELU_TANH),
        ("relu", ActivationKind.RELU),
    ],
)
def test_by_name(name: str, kind: ActivationKind) -> None:
    module = Experts(ACT2FN[name])
    assert activation_of(module) == Activation(kind)
    gate_up = torch.randn(5, 14)
    gate, up = gate_up.chunk(2, dim=-1)
    assert torch.equal(module._apply_gate(gate_up), FORMULAS[kind](gate) * up)


def test_gpt_oss_has_its_own_constants() -> None:
    module: Any = GptOssExperts.__new__(GptOssExperts)
    nn.Module.__init__(module)
    module.alpha, module.limit, module.has_gate = 1.5, 3.0, True
    assert activation_of(module) == Activation(ActivationKind.GPT_OSS, 1.5, 3.0)


def test_without_a_gate_only_what_is_of_up_alone() -> None:
    without = [activation_of(Experts(ACT2FN[name], has_gate=False)) for name in ("relu2", "silu")]
    assert without == [Activation(ActivationKind.RELU2), None]


@pytest.mark.parametrize("name", ["gelu_new", "quick_gelu", "relu2", "gelu_python", "tanh"])
def test_what_is_not_known_is_not_guessed(name: str) -> None:
    assert activation_of(Experts(ACT2FN[name])) is None


def test_a_gate_of_its_own_is_not_guessed() -> None:
    assert activation_of(OwnGate(nn.SiLU())) is None


def test_a_function_without_a_module_is_not_guessed() -> None:
    module = Experts(nn.SiLU())
    del module.act_fn
    module.act_fn = lambda gate: functional.silu(gate)
    assert activation_of(module) is None


def test_silu_itself_is_known() -> None:
    module = Experts(nn.SiLU())
    del module.act_fn
    module.act_fn = functional.silu
    assert activation_of(module) == Activation(ActivationKind.SILU)
