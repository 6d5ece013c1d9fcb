"""Lets transformers build a model without its experts' parameters.

transformers hands a model that it has built on the meta device to its ``HfQuantizer``
before it loads any weight. Ours, registered under the name "expertd", removes the experts'
parameters there, so no memory is ever allocated for them and none is missed. The rest of
the model is loaded as if it were a checkpoint in full precision.
"""

from typing import Any

import torch
from torch import nn
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from expertd.errors import PackError
from expertd.pack.manifest import Manifest
from expertd_inference.experts import IMPLEMENTATION, experts_modules, layer_numbers
from expertd_inference.kernels.reference import DOWN, GATE_UP

METHOD = IMPLEMENTATION

_REPLACED = {"gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias"}
"""The parameters of an experts module that records hold."""


@register_quantization_config(METHOD)
class ExpertdConfig(QuantizationConfigMixin):  # type: ignore[misc] # transformers is untyped
    """Carries the pack's manifest to :class:`ExpertdQuantizer`."""

    def __init__(self, manifest: Manifest) -> None:
        self.quant_method = METHOD
        self.manifest = manifest

    def to_dict(self) -> dict[str, Any]:
        """What ``config.to_dict`` shows; the manifest is not configuration."""
        return {"quant_method": METHOD, "scheme": self.manifest.scheme}


@register_quantizer(METHOD)
class ExpertdQuantizer(HfQuantizer):  # type: ignore[misc] # transformers is untyped
    """Removes the experts' parameters.

    ``experts`` are then the modules by layer, ``shapes`` those of the parameters that are left.
    """

    def __init__(self, quantization_config: ExpertdConfig, **kwargs: Any) -> None:  # noqa: ANN401
        super().__init__(quantization_config, **kwargs)
        self.manifest = quantization_config.manifest
        self.experts: dict[int, nn.Module] = {}
        self.shapes: dict[str, torch.Size] = {}

    def _process_model_before_weight_loading(self, model: nn.Module, **kwargs: Any) -> None:  # noqa: ANN401
        self.experts = match_experts(model, self.manifest)
        module: Any
        for module in self.experts.values():
            for name in _REPLACED & module._parameters.keys():
                module.register_parameter(name, None)
            # Else transformers would draw random weights for what it takes for missing.
            module._is_hf_initialized = True
        self.shapes = {name: parameter.shape for name, parameter in model.named_parameters()}

    def is_serializable(self) -> bool:
        """No: the model on its own is not whole."""
        return False

    @property
    def is_trainable(self) -> bool:
        """No: the experts are shared and read-only."""
        return False


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
        if unknown or not module.has_gate:
            reason = f"they have {', '.join(sorted(unknown))}" if unknown else "they have no gate"
            raise PackError(f"{what}: {reason}.")
        layer, config = layers[number], getattr(module, "num_experts", None)
        if config != layer.num_experts:
            raise PackError(
                f"{what}: layer {number} has {layer.num_experts} experts in the pack and "
                f"{config} in the model."
            )
        layout = manifest.layouts[layer.layout]
        if {matrix.name for matrix in layout.matrices} != {GATE_UP, DOWN}:
            raise PackError(f"{what}: layer {number} has other matrices than gate_up and down.")
        biased = {part.name for part in layout.parts} >= {f"{GATE_UP}.bias", f"{DOWN}.bias"}
        if biased != module.has_bias:
            raise PackError(f"{what}: layer {number} has biases only on one side.")
    return experts
