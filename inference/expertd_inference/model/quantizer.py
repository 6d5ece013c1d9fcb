"""Lets transformers build a model without its experts' parameters.

transformers hands a model that it has built on the meta device to its ``HfQuantizer``
before it loads any weight. Ours, registered under the name "expertd", removes the experts'
parameters there, so no memory is ever allocated for them and none is missed; and it puts a
:class:`QuantizedLinear` for each linear layer that the trunk holds quantized, if there is a
kernel for it. The rest of the model is loaded as if it were a checkpoint in full precision.
"""

from typing import Any

import torch
from torch import nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from expertd_inference.experts.cpu import IMPLEMENTATION, experts_modules, layer_numbers
from expertd_inference.experts.llama4 import adopt_llama4
from expertd_inference.model.quantized_linear import QuantizedLinear
from expertd_inference.model.tables import NO_TABLES, replace_tables
from expertstore.errors import PackError
from expertstore.pack.layout import DOWN, GATE_UP, UP
from expertstore.pack.manifest import Manifest
from expertstore.pack.seeing import SEEING, TEXT_WITHIN, leave_out_vision

METHOD = IMPLEMENTATION

_REPLACED = {f"{matrix}_{end}" for matrix in (GATE_UP, UP, DOWN) for end in ("proj", "proj_bias")}
"""The parameters of an experts module that records hold."""

_WITH_VISION = {*SEEING.values(), *TEXT_WITHIN.values()}
"""Classes that have a vision part as well."""

_MAX_WEIGHTS_PER_BYTE = 4
"""No scheme has less than 2 bits a weight."""


@register_quantization_config(METHOD)
class ExpertdConfig(QuantizationConfigMixin):  # type: ignore[misc] # transformers is untyped
    """Carries the pack's manifest to :class:`ExpertdQuantizer`.

    ``trunk_names`` are those of all the trunk's tensors if its quantized matrices are to stay
    so, and empty if they come dequantized. Of a class that sees, the vision part is taken away
    unless the pack ``sees``.
    """

    def __init__(
        self,
        manifest: Manifest,
        trunk_names: frozenset[str] = frozenset(),
        *,
        sees: bool = False,
    ) -> None:
        self.quant_method = METHOD
        self.manifest = manifest
        self.trunk_names = trunk_names
        self.sees = sees

    def to_dict(self) -> dict[str, Any]:
        """What ``config.to_dict`` shows; the manifest is not configuration."""
        return {"quant_method": METHOD, "scheme": self.manifest.scheme}


@register_quantizer(METHOD)
class ExpertdQuantizer(HfQuantizer):  # type: ignore[misc] # transformers is untyped
    """Removes the experts' parameters, and puts layers of ours in the place of others.

    ``experts`` are then the modules by layer, ``linears`` the quantized layers, yet to be loaded,
    by the checkpoint's name of their weight, ``tables`` the embeddings whose rows are not in the
    trunk, and ``shapes`` those of the parameters left.
    """

    def __init__(self, quantization_config: ExpertdConfig, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(quantization_config, **kwargs)
        self.manifest = quantization_config.manifest
        self.trunk_names = quantization_config.trunk_names
        self.sees = quantization_config.sees
        self.experts: dict[int, nn.Module] = {}
        self.linears: dict[str, QuantizedLinear] = {}
        self.shapes: dict[str, torch.Size] = {}
        self.tables = NO_TABLES

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:  # noqa: ANN401
        if not self.sees and self.manifest.architecture in _WITH_VISION:
            leave_out_vision(model)
        adopt_llama4(model)
        self.experts = match_experts(model, self.manifest)
        module: Any
        for module in self.experts.values():
            for name in _REPLACED & module._parameters.keys():
                module.register_parameter(name, None)
            # Else transformers would draw random weights for what it takes for missing.
            module._is_hf_initialized = True
        if self.trunk_names:
            self.linears = replace_linears(model, self.manifest, self.trunk_names)
        self.tables = replace_tables(model, self.manifest)
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        num_weights = sum(shape.numel() for shape in self.shapes.values())
        if num_weights > _MAX_WEIGHTS_PER_BYTE * self.manifest.trunk.num_bytes:
            # Before there is memory for weights that could only be missing.
            raise PackError(
                f"config.json of the pack describes a model of {num_weights} weights beside its "
                f"experts, and the trunk has {self.manifest.trunk.num_bytes} bytes; copy or make "
                "the pack again."
            )

    def is_serializable(self) -> bool:
        """No: the model on its own is not whole."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No: the experts are shared and read-only."""
        return False


def replace_linears(
    model: Any,  # noqa: ANN401 - transformers is untyped
    manifest: Manifest,
    trunk_names: frozenset[str],
) -> dict[str, QuantizedLinear]:
    """Puts a quantized layer for each matrix of the trunk that is one; by the checkpoint's names.

    Raises PackError if the model has another layer than a linear one there.
    """
    matrices = {tensor.name: tensor.matrix for tensor in manifest.trunk_quantized}
    mapping = get_model_conversion_mapping(model)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    prefix, state = model.base_model_prefix, model.state_dict()
    linears = {}
    # All names, in transformers' own order, which its lazily activated renamings depend on.
    for name in sorted(trunk_names, key=dot_natural_key):
        renamed, _ = rename_source_key(name, renamings, converters, prefix, state)
        if renamed not in state and name in state:
            renamed = name
        if name not in matrices:
            continue
        parent_name, _, leaf = renamed.removesuffix(".weight").rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            linear = parent.get_submodule(leaf)
        except AttributeError:
            linear = None
        if not isinstance(linear, nn.Linear):
            raise PackError(
                f"{manifest.architecture} of this transformers has no linear layer for {name} of "
                "the trunk; make the pack again."
            )
        linears[name] = QuantizedLinear(linear, matrices[name])
        setattr(parent, leaf, linears[name])
    return linears


def match_experts(model: nn.Module, manifest: Manifest) -> dict[int, nn.Module]:
    """The experts module of each of the pack's layers.

    Raises PackError, naming the architecture, if transformers' seam does not reach them all
    or if they hold anything that the records do not.
    """
    what = f"The experts of {manifest.architecture} cannot be served to this transformers"
    named = experts_modules(model)
    try:
        experts = dict(zip(layer_numbers(list(named)), named.values(), strict=True))
    except ValueError as error:
        raise PackError(f"{what}: {error}.") from error
    layers = {layer.layer: layer for layer in manifest.layers}
    if len(experts) != len(named) or experts.keys() != layers.keys():
        raise PackError(
            f"{what}: the pack has {len(layers)} MoE layers and the model {len(named)} whose "
            "experts can be replaced."
        )
    for number, module in experts.items():
        unknown = {name for name, _ in module.named_parameters()} - _REPLACED
        if unknown:
            raise PackError(f"{what}: they have {', '.join(sorted(unknown))}.")
        layer, config = layers[number], getattr(module, "num_experts", None)
        if config != layer.num_experts:
            raise PackError(
                f"{what}: layer {number} has {layer.num_experts} experts in the pack and "
                f"{config} in the model."
            )
        layout = manifest.layouts[layer.layout]
        inward = GATE_UP if module.has_gate else UP
        if {matrix.name for matrix in layout.matrices} != {inward, DOWN}:
            raise PackError(f"{what}: layer {number} has other matrices than {inward} and down.")
        biased = {part.name for part in layout.parts} >= {f"{inward}.bias", f"{DOWN}.bias"}
        if biased != module.has_bias:
            raise PackError(f"{what}: layer {number} has biases only on one side.")
    return experts
