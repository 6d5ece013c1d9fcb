"""A transformers model from a pack's trunk, its experts still unconnected."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from expertd.errors import PackError
from expertd.pack.manifest import Manifest
from expertd.packing.codec import TORCH_DTYPES
from expertd_inference.device.trunk_map import trunk_map
from expertd_inference.experts import IMPLEMENTATION
from expertd_inference.kernels.weights import Linear
from expertd_inference.quantizer import ExpertdConfig
from expertd_inference.trunk import TrunkFile


@dataclass(frozen=True)
class TrunkModel:
    """A model that lacks its experts, and the module of each MoE layer that wants them."""

    model: Any
    experts: Mapping[int, nn.Module]


def load_trunk(
    pack: Path,
    manifest: Manifest,
    *,
    dtype: torch.dtype | None = None,
    linear: Linear | None = None,
    placed: Mapping[int, str] | None = None,
) -> TrunkModel:
    """Loads everything of the pack but its experts, in ``dtype`` or the checkpoint's own.

    With ``linear`` the matrices that the trunk holds quantized stay so, and it computes with
    them; on the CPU they take no memory of this process, since they lie in the mapped file.
    Without, they are dequantized. ``placed`` says on which device each MoE layer computes, by
    torch's names: its part of the trunk is loaded there.

    Raises PackError if this transformers does not know the architecture, cannot have its
    experts replaced, or misses a weight in the trunk.
    """
    model_class = _model_class(pack, manifest)
    config = _config(pack, model_class)
    trunk = TrunkFile(pack, manifest)
    quantized = linear is not None and bool(manifest.trunk_quantized)
    model, report = model_class.from_pretrained(
        None,
        config=config,
        state_dict=trunk.state(dequantized=not quantized),
        quantization_config=ExpertdConfig(manifest, trunk.names if quantized else frozenset()),
        experts_implementation=IMPLEMENTATION,
        dtype=dtype or _dtype(manifest),
        generation_config=_generation_config(pack, config),
        device_map=_device_map(model_class, config, placed),
        local_files_only=True,
        # Reported, and so refused below in our own words.
        ignore_mismatched_sizes=True,
        output_loading_info=True,
    )
    wrong = {key for key, *_ in report["mismatched_keys"]} | {
        # Older releases do not look at the shapes of what a quantizer has to do with.
        name
        for name, parameter in model.named_parameters()
        if parameter.shape != model.hf_quantizer.shapes[name]
    }
    if missing := report["missing_keys"]:
        raise PackError(f"The trunk of {pack} lacks {min(missing)}; make the pack again.")
    if wrong:
        raise PackError(f"{min(wrong)} in the trunk of {pack} does not fit its config.json.")
    if linear is not None:
        for name, module in model.hf_quantizer.linears.items():
            module.load(trunk.parts(name), linear)
    if not model.hf_quantizer.linears:
        _say_not_quantized(model)
    model.requires_grad_(requires_grad=False)
    # Where tokenizers and processors look for their files.
    model.config.name_or_path = model.name_or_path = str(pack)
    return TrunkModel(model, model.hf_quantizer.experts)


def _device_map(
    model_class: Any,  # noqa: ANN401 - transformers is untyped
    config: Any,  # noqa: ANN401
    placed: Mapping[int, str] | None,
) -> dict[str, str] | None:
    if placed is None:
        return None
    if len(set(placed.values())) == 1:
        return trunk_map((), placed)
    with torch.device("meta"):
        model = model_class(config)
    return trunk_map(
        [
            name
            for name, module in model.named_modules()
            if any(True for _ in module.parameters(recurse=False))
            or any(True for _ in module.buffers(recurse=False))
        ],
        placed,
    )


def _say_not_quantized(model: nn.Module) -> None:
    """All that is left in the model are plain weights; transformers has noted otherwise.

    Some models (Jamba's) go around weights that they take for quantized, and round elsewhere.
    """
    for module in model.modules():
        if isinstance(config := getattr(module, "config", None), transformers.PreTrainedConfig):
            vars(config).pop("_is_quantized", None)


def _model_class(pack: Path, manifest: Manifest) -> Any:  # noqa: ANN401 - transformers is untyped
    found = getattr(transformers, manifest.architecture, None)
    if isinstance(found, type) and issubclass(found, transformers.GenerationMixin):
        return found
    raise PackError(
        f"This transformers ({transformers.__version__}) has no {manifest.architecture}, which "
        f"{pack} was made from; install one that has."
    )


def _dtype(manifest: Manifest) -> torch.dtype:
    if manifest.dtype not in TORCH_DTYPES:
        raise PackError(f"The pack's dtype {manifest.dtype!r} is unknown; pack it again.")
    return TORCH_DTYPES[manifest.dtype]


def _config(pack: Path, model_class: Any) -> Any:  # noqa: ANN401 - transformers is untyped
    path = pack / "config.json"
    if not path.is_file():
        # transformers would take its defaults.
        raise PackError(f"{pack} has no config.json; make the pack again.")
    try:
        config = model_class.config_class.from_pretrained(pack, local_files_only=True)
    except (OSError, ValueError, TypeError) as error:
        raise PackError(f"{path} cannot be used: {error}") from error
    # A checkpoint that came quantized says so here; the pack's trunk no longer is.
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _generation_config(pack: Path, config: Any) -> Any:  # noqa: ANN401 - transformers is untyped
    try:
        return transformers.GenerationConfig.from_pretrained(pack, local_files_only=True)
    except OSError:
        return transformers.GenerationConfig.from_model_config(config)
