"""A transformers model from a pack's trunk, its experts still unconnected."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from expertd_inference.device.trunk_map import trunk_map
from expertd_inference.experts.cpu import IMPLEMENTATION
from expertd_inference.experts.recovery import say_on_stderr
from expertd_inference.kernels.weights import Linear
from expertd_inference.model.generation_config import read_generation_config
from expertd_inference.model.pack_config import CONFIG, read_config
from expertd_inference.model.quantizer import ExpertdConfig
from expertd_inference.model.tables import NO_TABLES, Tables
from expertd_inference.model.trunk import TrunkCheck, TrunkFile
from expertd_inference.process.reasons import reason_of
from expertstore.errors import ExpertdError, PackError
from expertstore.pack.codec import TORCH_DTYPES
from expertstore.pack.manifest import Manifest
from expertstore.pack.seeing import sees


@dataclass(frozen=True)
class TrunkModel:
    """A model that lacks its experts, and the module of each MoE layer that wants them.

    And the embeddings that want a source of their rows.
    """

    model: Any
    experts: Mapping[int, nn.Module]
    tables: Tables = NO_TABLES


def load_trunk(
    pack: Path,
    manifest: Manifest,
    *,
    dtype: torch.dtype | None = None,
    linear: Linear | None = None,
    placed: Mapping[int, str] | None = None,
    say: Callable[[str], None] = say_on_stderr,
) -> TrunkModel:
    """Loads everything of the pack but its experts, in ``dtype`` or the checkpoint's own.

    With ``linear`` the matrices that the trunk holds quantized stay so, and it computes with
    them; on the CPU they take no memory of this process, since they lie in the mapped file.
    Without, they are dequantized. ``placed`` says on which device each MoE layer computes, by
    torch's names: its part of the trunk is loaded there. ``say`` is told what of the pack's
    config.json is done otherwise here.

    The trunk's file is read whole and held against its checksum while the model is built. Raises
    PackError if that is wrong, if this transformers does not know the architecture, cannot have
    its experts replaced or cannot use the pack's config.json, and if a weight is missing.
    """
    trunk = TrunkFile(pack, manifest)
    with TrunkCheck(pack, manifest) as check:
        try:
            loaded = _load(pack, manifest, trunk, dtype, linear, placed, say)
        except Exception:
            check.finish()  # Whatever else is wrong may come of damage.
            raise
        check.finish()
    return loaded


def _load(
    pack: Path,
    manifest: Manifest,
    trunk: TrunkFile,
    dtype: torch.dtype | None,
    linear: Linear | None,
    placed: Mapping[int, str] | None,
    say: Callable[[str], None],
) -> TrunkModel:
    """As :func:`load_trunk`, whatever the trunk's bytes are."""
    model_class = _model_class(pack, manifest)
    config = read_config(
        pack,
        manifest,
        model_class,
        max_layers=_num_layers(manifest, trunk),
        on_gpu=placed is not None,
        say=say,
    )
    quantized = linear is not None and bool(manifest.trunk_quantized)
    generation_config = read_generation_config(pack, config)
    try:
        model, report = model_class.from_pretrained(
            None,
            config=config,
            state_dict=trunk.state(dequantized=not quantized),
            quantization_config=ExpertdConfig(
                manifest,
                trunk.names if quantized else frozenset(),
                sees=sees(pack, manifest.model_type),
            ),
            experts_implementation=IMPLEMENTATION,
            dtype=dtype or _dtype(manifest),
            generation_config=generation_config,
            device_map=_device_map(model_class, config, placed),
            local_files_only=True,
            # Reported, and so refused below in our own words.
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    except ExpertdError:
        raise
    except Exception as error:  # whatever a model's own code meets in a configuration
        if placed is not None and isinstance(error, RuntimeError):
            raise  # the device's
        raise PackError(
            f"transformers {transformers.__version__} cannot build {manifest.architecture} by "
            f"{pack / CONFIG}: {reason_of(error)}."
        ) from error
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
    for table in model.hf_quantizer.tables.modules.values():
        table.dtype = model.dtype
    return TrunkModel(model, model.hf_quantizer.experts, model.hf_quantizer.tables)


def _num_layers(manifest: Manifest, trunk: TrunkFile) -> int:
    """One more than the highest number in a name of the trunk, or of the last with experts."""
    numbers = (int(number) for name in trunk.names for number in re.findall(r"\.(\d+)\.", name))
    return 1 + max([manifest.layers[-1].layer, *numbers])


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
