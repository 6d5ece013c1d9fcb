"""What a checkpoint's configuration says about its model, without any weights.

The model is built on torch's meta device, where parameters have shapes and no memory. Its MoE
layers are the modules with transformers' experts seam (``@use_experts_implementation``), the
same that a worker replaces.
"""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from expertd.packing.checkpoint_files import CONFIG_NAME, read_config
from expertstore.errors import CheckpointError
from expertstore.pack.layout import DOWN, GATE_UP, UP
from expertstore.pack.manifest import GateOrder
from expertstore.pack.seeing import SEEING, TEXT_PART, TEXT_WITHIN, has_processor, leave_out_vision

_ATTENTION = {"self_attn", "attention", "attn"}
"""Names of attention modules."""
_FEED_FORWARD = {
    "gate_proj", "up_proj", "down_proj", "gate_up_proj", "w1", "w2", "w3", "fc1", "fc2",
    "input_linear", "output_linear",
}  # fmt: skip
"""Names of a feed-forward's linear layers. Routers and the gates of shared experts, which are
linear layers too in some models, have others."""

_LLAMA4 = "Llama4TextExperts"
"""A class outside of the seam that a worker computes all the same."""


@dataclass(frozen=True)
class ExpertsModule:
    """The experts of one decoder layer; ``name`` is the module's in the model."""

    name: str
    layer: int
    num_experts: int
    experts_per_token: int
    hidden_size: int
    intermediate_size: int
    gate_order: GateOrder
    has_bias: bool
    is_transposed: bool
    has_gate: bool = True

    @property
    def inward(self) -> str:
        """The name of the matrix that rows enter by."""
        return GATE_UP if self.has_gate else UP

    def parameter(self, leaf: str) -> str:
        """The full name of the module's parameter ``leaf``."""
        return f"{self.name}.{leaf}"

    def parameters(self) -> list[str]:
        """The full names of all parameters that records hold."""
        ends = ["proj", "proj_bias"] if self.has_bias else ["proj"]
        return [self.parameter(f"{matrix}_{end}") for end in ends for matrix in (self.inward, DOWN)]


_TABLES = {"embed_tokens_per_layer", "ngram_embedding"}
"""Embeddings of which a token reads a few rows, and which nothing multiplies: per-layer embeddings
(Gemma), hashed n-grams (Qwen's)."""


@dataclass(frozen=True)
class Architecture:
    """A model by its configuration; ``model`` is transformers' own, on the meta device."""

    name: str
    model_type: str
    model: Any
    experts: tuple[ExpertsModule, ...]
    sees: bool = False
    """Whether ``model`` has a vision part as well."""

    def attention_linears(self) -> set[str]:
        """The weights of the linear layers under an attention module, by full name."""
        names = self._linears().keys() - self._vision()
        return {f"{name}.weight" for name in names if _ATTENTION & {*name.split(".")}}

    def dense_linears(self) -> set[str]:
        """The weights of the linear layers of dense layers and shared experts, by full name."""
        return {
            f"{name}.weight"
            for name in self._linears().keys() - self._vision()
            if name.rpartition(".")[2] in _FEED_FORWARD and not _ATTENTION & {*name.split(".")}
        }

    def vision_linears(self) -> set[str]:
        """The weights of the vision part's linear layers, by full name."""
        return {f"{name}.weight" for name in self._vision()}

    def head(self) -> set[str]:
        """The weight of the output head by full name; none where it is the embeddings'."""
        head = self.model.get_output_embeddings()
        names = {f"{name}.weight" for name, module in self._linears().items() if module is head}
        return names - set(self.model.all_tied_weights_keys)

    def _vision(self) -> set[str]:
        """The names of its linear layers."""
        if not self.sees:
            return set()
        head = self.model.get_output_embeddings()
        return {
            name
            for name, module in self._linears().items()
            if not name.startswith(TEXT_PART) and module is not head
        }

    def tables(self, min_bytes: int) -> dict[str, int]:
        """The weights of embeddings that may be tables, and how many rows of each a token reads.

        Of those that have at least ``min_bytes`` in 16 bits.
        """
        found = {}
        for name, module in self.model.named_modules():
            parent, _, leaf = name.rpartition(".")
            if isinstance(module, nn.Embedding) and leaf in _TABLES:
                rows = getattr(self.model.get_submodule(parent), "ngram_heads", 1)
                if 2 * module.weight.numel() >= min_bytes:
                    found[f"{name}.weight"] = int(rows)
        return found

    def _linears(self) -> dict[str, nn.Module]:
        """Not those that compute something else, such as DeepSeek V4's output in groups."""
        return {
            name: module
            for name, module in self.model.named_modules()
            if isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
        }

    def missing_parameters(self, filled: set[str]) -> set[str]:
        """The parameters that a checkpoint must have and that are not among ``filled``.

        Of tied ones, under whichever name they are there, one is enough.
        """
        tied = self.model.all_tied_weights_keys
        filled = filled | {source for target, source in tied.items() if target in filled}
        names: set[str] = {name for name, _ in self.model.named_parameters()}
        return names.difference(tied, filled)

    def stays_float32(self, parameter: str) -> bool:
        """Whether transformers keeps that parameter in float32 when the rest has 16 bits."""
        patterns = self.model._keep_in_fp32_modules_strict or ()
        return any(re.search(rf"(^|\.){pattern}(\.|$)", parameter) for pattern in patterns)


def read_architecture(path: Path, *, text_only: bool = False) -> Architecture:
    """The architecture of the checkpoint in ``path``; with ``text_only``, of its language model.

    Raises :class:`CheckpointError`.
    """
    raw = read_config(path)
    named = raw.get("architectures")
    name = str(named[0] if isinstance(named, list) and named else raw.get("model_type"))
    described = raw.get("quantization_config")
    if described is not None and not isinstance(described, dict):
        raise CheckpointError(
            f"{path / CONFIG_NAME}: quantization_config is {described!r}, and must be an object; "
            "take it out if the weights are not quantized."
        )
    try:
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
        sees = config.model_type in SEEING and has_processor(path) and not text_only
        with torch.device("meta"):
            model = _whole(config) if sees else _language_model(config)
    except Exception as error:  # whatever transformers meets in a configuration it cannot use
        raise CheckpointError(
            f"{path} has the architecture {name}, which transformers {transformers.__version__} "
            f"cannot build as a language model ({_first_line(error)})."
        ) from error
    for module in model.modules():
        if type(module).__name__ == _LLAMA4:
            module.has_gate = module.is_transposed = module.is_concatenated = True
            module.has_bias = False
    modules = {
        module_name: module
        for module_name, module in model.named_modules()
        if hasattr(module, "has_gate") and hasattr(module, "is_transposed")
    }
    if not modules:
        raise CheckpointError(_no_seam(path, name, model))
    experts = tuple(
        _experts_module(path, name, module_name, module, config)
        for module_name, module in modules.items()
    )
    layers = [module.layer for module in experts]
    if len(set(layers)) != len(layers):
        raise CheckpointError(
            f"{path} has the architecture {name}, with several sets of experts in one layer, "
            "which is not supported."
        )
    return Architecture(
        name=type(model).__name__,
        model_type=str(config.model_type),
        model=model,
        experts=tuple(sorted(experts, key=lambda module: module.layer)),
        sees=sees,
    )


def _whole(config: Any) -> Any:  # noqa: ANN401 - transformers is untyped
    """A model that sees."""
    name = {**SEEING, **TEXT_WITHIN}[config.model_type]
    return getattr(transformers, name)._from_config(config, attn_implementation="eager")


def _language_model(config: Any) -> Any:  # noqa: ANN401
    """Of a model that sees, the language model alone: transformers' class of it, or the rest."""
    whole = config.model_type in {**SEEING, **TEXT_WITHIN}
    if type(config) in AutoModelForCausalLM._model_mapping or not whole:
        return AutoModelForCausalLM.from_config(
            config, trust_remote_code=False, attn_implementation="eager"
        )
    model = _whole(config)
    leave_out_vision(model)
    return model


def _no_seam(path: Path, name: str, model: Any) -> str:  # noqa: ANN401 - transformers is untyped
    """Why a model without the experts seam cannot be packed."""
    for module_name, module in model.named_modules():
        if re.search(r"expert|moe", module_name):
            kind = type(module).__name__
            return (
                f"{path} has the architecture {name}, whose experts ({kind}, in {module_name}) are "
                "outside of transformers' experts interface; a transformers that lets them be "
                f"replaced (use_experts_implementation on {kind}) would help."
            )
    return (
        f"{path} has the architecture {name}, which has no experts; expertd serves "
        "Mixture-of-Experts models."
    )


def _experts_module(
    path: Path,
    architecture: str,
    name: str,
    module: Any,  # noqa: ANN401 - transformers is untyped
    config: Any,  # noqa: ANN401
) -> ExpertsModule:
    """Reads one experts module. Raises :class:`CheckpointError` if it is of another kind."""
    index = re.search(r"\.(\d+)\.", name)
    kind = type(module).__name__
    if getattr(module, "has_post_expert_norm", False):
        raise CheckpointError(
            f"{path} has the architecture {architecture}, whose experts ({kind}, in {name}) have a "
            "norm after down, which records and kernels do not know; another model would help."
        )
    if index is None:
        raise CheckpointError(
            f"{path} has the architecture {architecture}, whose experts ({kind}, in {name}) are "
            "those of no one layer; records are kept by layer, and another model would help."
        )
    inward = module.gate_up_proj if module.has_gate else module.up_proj
    num_experts, first, second = inward.shape
    hidden_size, num_rows = (first, second) if module.is_transposed else (second, first)
    return ExpertsModule(
        name=name,
        layer=int(index[1]),
        num_experts=num_experts,
        experts_per_token=_experts_per_token(
            path, config.get_text_config(), int(index[1]), num_experts
        ),
        hidden_size=hidden_size,
        intermediate_size=num_rows // 2 if module.has_gate else num_rows,
        gate_order=GateOrder.CONCATENATED if module.is_concatenated else GateOrder.INTERLEAVED,
        has_bias=module.has_bias,
        is_transposed=module.is_transposed,
        has_gate=module.has_gate,
    )


def _experts_per_token(path: Path, config: Any, layer: int, num_experts: int) -> int:  # noqa: ANN401
    for key in ("num_experts_per_tok", "top_k_experts", "moe_topk", "moe_k", "top_k"):
        value = getattr(config, key, None)
        if isinstance(value, list):
            value = value[layer] if layer < len(value) else None
        if isinstance(value, int) and value > num_experts:
            raise CheckpointError(
                f"{path / CONFIG_NAME} asks for {value} experts per token ({key}) in layer "
                f"{layer}, which has {num_experts}; give the config.json of these weights."
            )
        if isinstance(value, int) and value > 0:
            _check_groups(path, config, value, num_experts)
            return value
    raise CheckpointError(f"{path / CONFIG_NAME} does not say how many experts a token uses.")


def _check_groups(path: Path, config: Any, per_token: int, num_experts: int) -> None:  # noqa: ANN401
    """Raises :class:`CheckpointError` if routing by groups of experts cannot work."""
    groups, chosen = getattr(config, "n_group", None), getattr(config, "topk_group", None)
    if not isinstance(groups, int) or not isinstance(chosen, int) or groups == 1:
        return
    sound = 0 < chosen <= groups and num_experts % groups == 0
    if not sound or per_token > chosen * (num_experts // groups):
        raise CheckpointError(
            f"{path / CONFIG_NAME} chooses {per_token} experts per token out of {chosen} of "
            f"{groups} groups (topk_group, n_group), which {num_experts} experts do not allow; "
            "give the config.json of these weights."
        )


def _first_line(error: Exception) -> str:
    return (str(error) or type(error).__name__).splitlines()[0].rstrip(".")
