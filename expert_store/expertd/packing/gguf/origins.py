"""From which tensors of a GGUF file each parameter of the model comes, and what to undo.

Names are those of ``gguf.TensorNameMap``, which leads from transformers' names to llama.cpp's, and
is asked for each parameter of the model. llama.cpp's converter also changes values: what it does to
an architecture is undone here. Rows are moved as they are stored; all else needs the weights.
"""

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from gguf import MODEL_ARCH_NAMES, TensorNameMap, get_tensor_name_map
from torch import Tensor

from expertd.packing.architecture import Architecture, ExpertsModule
from expertd.packing.gguf.model_file import GgufModel
from expertstore.errors import CheckpointError
from expertstore.pack.manifest import GateOrder

Undo = Callable[[Sequence[Tensor]], Tensor]
"""From the float32 tensors of an origin to the parameter, but for its shape."""


@dataclass(frozen=True)
class Origin:
    """What one parameter is made of."""

    tensors: tuple[str, ...]
    """Names in the file; rows of the first come first."""
    rows: Tensor | None = None
    """The parameter's row i is row ``rows[i]`` of the tensors; None: the same."""
    undo: Undo | None = None
    """What has to be done to the weights before rows are moved."""


def find_origins(model: GgufModel, architecture: Architecture) -> dict[str, Origin]:
    """By the model's name of each parameter that the file has; buffers it may lack.

    Raises :class:`CheckpointError` if a parameter is not there.
    """
    state = architecture.model.state_dict()
    of_experts = dict(_experts_origins(model, architecture))
    finder = _Finder(model, architecture)
    tied = architecture.model.all_tied_weights_keys
    parameters = {name for name, _ in architecture.model.named_parameters()}
    found = dict(of_experts)
    for name in state:
        if name in found or (name in tied and not finder.has(name)):
            continue
        origin = finder.find(name)
        if origin is not None:
            found[name] = origin
        elif name in parameters:
            raise CheckpointError(
                f"{model.file} lacks the weights of {name} ({finder.usual(name)}); it was made by "
                "another llama.cpp than is known: get another file of the model."
            )
    return found


def _experts_origins(model: GgufModel, architecture: Architecture) -> Iterator[tuple[str, Origin]]:
    """Of the fused parameters of all experts modules: [experts, rows, columns]."""
    for module in architecture.experts:
        stem = f"blk.{module.layer}.ffn"
        fused = f"{stem}_gate_up_exps.weight" in model.tensors
        old = f"{stem}_gate.0.weight"
        if not fused and f"{stem}_gate_exps.weight" not in model.tensors:
            reason = "get another file of the model"
            if old in model.tensors:
                reason = f"it has one for each expert ({old}), as old files do: get a newer one"
            raise CheckpointError(f"{model.file} lacks {stem}_gate_exps.weight; {reason}.")
        gate_up = ("gate_up",) if fused else ("gate", "up")
        for leaf, kinds in (("gate_up_proj", gate_up), ("down_proj", ("down",))):
            rows = None
            if leaf == "gate_up_proj" and module.gate_order is GateOrder.INTERLEAVED:
                rows = _interleaved(module)
            ends = [("", "weight")] + ([("_bias", "bias")] if module.has_bias else [])
            for ours, theirs in ends:
                names = tuple(f"{stem}_{kind}_exps.{theirs}" for kind in kinds)
                yield module.parameter(f"{leaf}{ours}"), Origin(names, rows)


def _interleaved(module: ExpertsModule) -> Tensor:
    """Gate, up, gate, up ... of all gate rows, then all up rows."""
    half = torch.arange(module.intermediate_size)
    return torch.stack((half, half + module.intermediate_size), dim=1).flatten()


class _Finder:
    """Finds parameters outside of experts."""

    def __init__(self, model: GgufModel, architecture: Architecture) -> None:
        self._model = model
        self._config = architecture.model.config
        numbers = {name: number for number, name in MODEL_ARCH_NAMES.items()}
        self._names: TensorNameMap = get_tensor_name_map(
            numbers[model.architecture], int(self._config.num_hidden_layers)
        )
        self._special = _SPECIAL.get(model.architecture, {})

    def has(self, name: str) -> bool:
        """Whether the file has the parameter under its usual name."""
        return self.usual(name) in self._model.tensors

    def usual(self, name: str) -> str:
        """The file's name for the parameter; empty if nobody knows one."""
        layer, leaf = _split(name)
        for ours, theirs in _NAMES.items():
            if leaf.endswith(ours):
                return f"blk.{layer}.{theirs}"
        return str(self._names.get_name(name, try_suffixes=(".weight", ".bias")) or "")

    def find(self, name: str) -> Origin | None:
        """Where the parameter comes from; None if the file does not have it."""
        layer, leaf = _split(name)
        for pattern, make in self._special.items():
            if re.fullmatch(pattern, leaf or name):
                origin = make(f"blk.{layer}.", self._config)
                if all(tensor in self._model.tensors for tensor in origin.tensors):
                    return origin
        usual = self.usual(name)
        return Origin((usual,)) if usual in self._model.tensors else None


def _split(name: str) -> tuple[str, str]:
    """The number of a parameter's layer, and its name in the layer."""
    match = re.search(r"\.layers\.(\d+)\.(.+)", name)
    return (match[1], match[2]) if match else ("", "")


_NAMES = {
    "e_score_correction_bias": "exp_probs_b.bias",
    "block_sparse_moe.router.weight": "ffn_gate_inp.weight",
    "linear_attn.dt_bias": "ssm_dt.bias",
    "linear_attn.A_log": "ssm_a",
    "self_attn.sinks": "attn_sinks.weight",
}
"""Ends of parameters' names that the name map does not know, or has without their ends."""

Make = Callable[[str, Any], Origin]
"""From the layer's prefix and the model's configuration."""


def _unpermuted(kind: str, heads: str) -> Make:
    """llama.cpp's rotary layers want the halves of a head interleaved."""

    def make(layer: str, config: Any) -> Origin:  # noqa: ANN401 - transformers is untyped
        num_heads = getattr(config, heads)
        head_dim = getattr(config, "head_dim", None) or (
            config.hidden_size // config.num_attention_heads
        )
        rows = torch.arange(num_heads * head_dim).view(num_heads, head_dim // 2, 2)
        return Origin((f"{layer}{kind}",), rows.transpose(1, 2).flatten())

    return make


_PERMUTED: Mapping[str, Make] = {
    rf"self_attn\.{ours}_proj\.{end}": _unpermuted(f"attn_{ours}.{end}", heads)
    for ours, heads in (("q", "num_attention_heads"), ("k", "num_key_value_heads"))
    for end in ("weight", "bias")
}


def _latent(layer: str, config: Any) -> Origin:  # noqa: ANN401 - transformers is untyped
    """DeepSeek's kv_b_proj, which newer files have as two for the absorbed form of attention."""

    def undo(tensors: Sequence[Tensor]) -> Tensor:
        keys, values = tensors  # [heads, latent, nope], [heads, value, latent]
        joined = torch.cat((keys.transpose(1, 2), values), dim=1)
        return joined.reshape(-1, joined.shape[-1])

    del config
    return Origin((f"{layer}attn_k_b.weight", f"{layer}attn_v_b.weight"), undo=undo)


def _shared_mlp(layer: str, config: Any) -> Origin:  # noqa: ANN401 - transformers is untyped
    del config
    return Origin((f"{layer}ffn_gate_shexp.weight", f"{layer}ffn_up_shexp.weight"))


def _offset(kind: str) -> Make:
    """A norm that is stored with 1 added."""

    def make(layer: str, config: Any) -> Origin:  # noqa: ANN401 - transformers is untyped
        del config
        prefix = "" if kind.startswith("output") else layer
        return Origin((f"{prefix}{kind}.weight",), undo=lambda tensors: tensors[0] - 1)

    return make


_OFFSET_NORMS: Mapping[str, Make] = {
    r"model\.norm\.weight": _offset("output_norm"),
    r"input_layernorm\.weight": _offset("attn_norm"),
    r"post_attention_layernorm\.weight": _offset("post_attention_norm"),
    r"self_attn\.q_norm\.weight": _offset("attn_q_norm"),
    r"self_attn\.k_norm\.weight": _offset("attn_k_norm"),
}


def _log_negated(tensors: Sequence[Tensor]) -> Tensor:
    return torch.log(-tensors[0])


def _queries_keys_values_gates(layer: str, config: Any) -> Origin:  # noqa: ANN401
    """Qwen3-Next's in_proj_qkvz: by key heads there, by what they are in the file."""
    keys, values = config.linear_num_key_heads, config.linear_num_value_heads
    key_rows = torch.arange(keys * config.linear_key_head_dim).view(keys, -1)
    value_rows = torch.arange(values * config.linear_value_head_dim).view(keys, -1)
    num_keys, num_values = key_rows.numel(), value_rows.numel()
    rows = torch.cat(
        (
            key_rows,
            num_keys + key_rows,
            2 * num_keys + value_rows,
            2 * num_keys + num_values + value_rows,
        ),
        dim=1,
    )
    return Origin((f"{layer}attn_qkv.weight", f"{layer}attn_gate.weight"), rows.flatten())


def _grouped_values(kind: str, *, head_dim: str = "", is_after_keys: bool = False) -> Make:
    """Qwen3.5: rows by value heads, which the file has in turns over the key heads.

    ``head_dim`` names the configuration's number of rows of a head, else one;
    ``is_after_keys``: those of queries and keys come first, and stay.
    """

    def make(layer: str, config: Any) -> Origin:  # noqa: ANN401 - transformers is untyped
        first = 0
        if is_after_keys:
            first = 2 * config.linear_num_key_heads * config.linear_key_head_dim
        rows = first + _by_key_head(config, getattr(config, head_dim) if head_dim else 1)
        rows = torch.cat((torch.arange(first), rows))
        undo = _log_negated if kind == "ssm_a" else None
        return Origin((f"{layer}{kind}",), rows, undo)

    return make


def _by_key_head(config: Any, head_dim: int) -> Tensor:  # noqa: ANN401 - transformers is untyped
    """Where the file has each of the model's rows: [value of a key head, key head] there."""
    keys = config.linear_num_key_heads
    per_key = config.linear_num_value_heads // keys
    places = torch.arange(keys * per_key * head_dim).view(per_key, keys, head_dim)
    return places.transpose(0, 1).flatten()


def _value_columns(layer: str, config: Any) -> Origin:  # noqa: ANN401 - transformers is untyped
    columns = _by_key_head(config, config.linear_value_head_dim)
    return Origin((f"{layer}ssm_out.weight",), undo=lambda tensors: tensors[0][:, columns])


_SPECIAL: Mapping[str, Mapping[str, Make]] = {
    "deepseek2": {r"self_attn\.kv_b_proj\.weight": _latent},
    "granitemoe": {**_PERMUTED, r"shared_mlp\.input_linear\.weight": _shared_mlp},
    "llama": _PERMUTED,
    "qwen3next": {
        **_OFFSET_NORMS,
        r"linear_attn\.A_log": lambda layer, _: Origin((f"{layer}ssm_a",), undo=_log_negated),
        r"linear_attn\.in_proj_qkvz\.weight": _queries_keys_values_gates,
    },
    "qwen35moe": {
        **_OFFSET_NORMS,
        r"linear_attn\.A_log": _grouped_values("ssm_a"),
        r"linear_attn\.dt_bias": _grouped_values("ssm_dt.bias"),
        r"linear_attn\.in_proj_a\.weight": _grouped_values("ssm_alpha.weight"),
        r"linear_attn\.in_proj_b\.weight": _grouped_values("ssm_beta.weight"),
        r"linear_attn\.in_proj_z\.weight": _grouped_values(
            "attn_gate.weight", head_dim="linear_value_head_dim"
        ),
        r"linear_attn\.in_proj_qkv\.weight": _grouped_values(
            "attn_qkv.weight", head_dim="linear_value_head_dim", is_after_keys=True
        ),
        r"linear_attn\.conv1d\.weight": _grouped_values(
            "ssm_conv1d.weight", head_dim="linear_value_head_dim", is_after_keys=True
        ),
        r"linear_attn\.out_proj\.weight": _value_columns,
    },
}
"""What llama.cpp's converter changes, by architecture and by a pattern of the parameter's name in
its layer, or of its whole name outside of layers."""
