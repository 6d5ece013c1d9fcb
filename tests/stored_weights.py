"""Tiny checkpoints whose weights are stored as others publish them, and what these stand for.

compressed-tensors' forms are packed and read by its own library, the others by loops of our own.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from compressed_tensors.compressors import BaseCompressor
from compressed_tensors.quantization import QuantizationArgs, QuantizationScheme
from safetensors.torch import load_file, save_file
from torch import Tensor

from expertd_testing.tiny_models import make_checkpoint

E2M1 = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6], np.float32)


@dataclass(frozen=True)
class Stored:
    """One weight: its tensors by the ends of their names after the module's, and its values."""

    pieces: dict[str, Tensor]
    values: Tensor
    """What it stands for in bfloat16, [out, in]."""


@dataclass(frozen=True)
class Kind:
    """A way to store weights."""

    store: Callable[[tuple[int, int], torch.Generator], Stored]
    config: dict[str, Any]
    """Of ``quantization_config``."""
    form: str
    """What ``as-is`` makes of it: a precision, and the type of scales."""


def make_stored(path: Path, kind: Kind) -> tuple[Path, Path]:
    """A tiny Qwen3-MoE with its linear layers stored so, and the same in bfloat16."""
    settings = {"num_hidden_layers": 2, "num_experts": 8, "moe_intermediate_size": 256}
    plain = make_checkpoint("qwen3_moe", path / "plain", **settings)
    return store(path, {"_proj.weight": kind}), plain


def store(path: Path, kinds: dict[str, Kind]) -> Path:
    """A copy of the checkpoint ``path / "plain"`` with weights stored by what their names have.

    The checkpoint gets the weights that these stand for. Of all experts in one, each is stored.
    """
    plain = path / "plain"
    tensors = load_file(plain / "model.safetensors")
    stored = dict(tensors)
    generator = torch.Generator().manual_seed(0)
    for name in tensors:
        kind = next((kind for part, kind in kinds.items() if part in name), None)
        if kind is None:
            continue
        del stored[name]
        *experts, rows, columns = tensors[name].shape
        each = [kind.store((rows, columns), generator) for _ in range(*experts or [1])]
        pieces = {end: torch.stack([one.pieces[end] for one in each]) for end in each[0].pieces}
        values = torch.stack([one.values for one in each])
        if not experts:
            pieces, values = {end: piece[0] for end, piece in pieces.items()}, values[0]
        tensors[name] = values.to(torch.bfloat16).contiguous()
        stem = name.removesuffix("weight")
        stored |= {f"{stem}{end}": piece.contiguous() for end, piece in pieces.items()}
    save_file(tensors, plain / "model.safetensors", {"format": "pt"})
    config = json.loads((plain / "config.json").read_text())
    (path / "stored").mkdir()
    save_file(stored, path / "stored/model.safetensors", {"format": "pt"})
    config |= {"quantization_config": [*kinds.values()][-1].config}
    (path / "stored/config.json").write_text(json.dumps(config))
    return path / "stored"


def _scales(shape: tuple[int, ...], columns: int, generator: torch.Generator) -> Tensor:
    """Such that integers of a few units give weights of variance 1 / columns."""
    noise = 0.5 + torch.rand(shape, generator=generator)
    return noise / (4 * columns**0.5)


def library(format_name: str, config: dict[str, Any], form: str, **weights: Any) -> Kind:
    """compressed-tensors' own."""
    args = QuantizationArgs(**weights)
    scheme = QuantizationScheme(targets=["Linear"], weights=args, format=format_name)
    compressor = BaseCompressor.get_value_from_registry(format_name)
    group = {"targets": ["Linear"], "weights": json.loads(args.model_dump_json())}
    config = {
        "quant_method": "compressed-tensors",
        "format": format_name,
        "config_groups": {"group_0": group},
        "ignore": ["lm_head"],
        **config,
    }

    def store(shape: tuple[int, int], generator: torch.Generator) -> Stored:
        rows, columns = shape
        groups = columns // (args.group_size or columns)
        state = {"weight_scale": _scales((rows, groups), columns, generator).bfloat16()}
        if args.num_bits == 8 and args.type == "float":
            values = torch.randn((rows, groups, columns // groups), generator=generator)
            state["weight_scale"] = state["weight_scale"].log2().floor().exp2()
        elif args.group_size == 16:
            divisor = torch.tensor([2000 + 1000 * torch.rand((), generator=generator)])
            scales = (state["weight_scale"].float() * divisor).to(torch.float8_e4m3fn)
            state |= {"weight_scale": scales.float(), "weight_global_scale": divisor}
            draw = torch.from_numpy(E2M1)[torch.randint(16, shape, generator=generator)]
            values = (draw.view(rows, groups, -1) * scales.float()[..., None] / divisor).view(shape)
            state["weight"] = values
            pieces = compressor.compress(state, scheme)
            return Stored(pieces, compressor.decompress(pieces, scheme)["weight"])
        elif args.type == "float":
            state["weight_scale"] = state["weight_scale"].log2().floor().exp2()
            draw = torch.from_numpy(E2M1)[torch.randint(16, shape, generator=generator)]
            values = draw.view(rows, groups, -1)
        else:
            half = 1 << args.num_bits - 1
            drawn = torch.randint(-half, half, shape, generator=generator)
            values = drawn.float().view(rows, groups, -1)
            if not args.symmetric:
                zero = torch.randint(-half, half, (rows, groups), generator=generator)
                state["weight_zero_point"] = zero.to(torch.int8)
                values -= zero.unsqueeze(-1)
            values /= half / 4
            state["weight_scale"] /= half / 4
            values *= half / 4
        state["weight"] = (values * state["weight_scale"].unsqueeze(-1)).view(shape).bfloat16()
        pieces = compressor.compress(state, scheme)
        return Stored(pieces, compressor.decompress(pieces, scheme)["weight"])

    return Kind(store, config, form)


def words(values: np.ndarray, bits: int) -> Tensor:
    """int32 [rows, n * bits / 32] of integers [rows, n], bit by bit."""
    digits = values.astype(np.uint8)[..., None] >> np.arange(bits) & 1
    stream = digits.reshape(len(values), -1).astype(np.uint8)
    data = np.packbits(stream, axis=1, bitorder="little")
    return torch.from_numpy(data.view(np.int32).copy())


def gptq(bits: int, group: int, form: str, *, v2: bool = False, ordered: bool = False) -> Kind:
    """AutoGPTQ's; ``ordered`` has inputs in groups by activation order."""
    config = {"quant_method": "gptq", "bits": bits, "group_size": group, "desc_act": ordered}
    config["checkpoint_format"] = "gptq_v2" if v2 else "gptq"

    def store(shape: tuple[int, int], generator: torch.Generator) -> Stored:
        rows, columns = shape
        groups = columns // group if group > 0 else 1
        q = torch.randint(1 << bits, shape, generator=generator)
        zeros = torch.randint(1, 1 << bits, (rows, groups), generator=generator)
        scales = (_scales((rows, groups), columns, generator) * 8 / (1 << bits)).half()
        index = torch.arange(columns) // (columns // groups)
        if ordered:
            index = index[torch.randperm(columns, generator=generator)]
        values = (q - zeros[:, index]) * scales.float()[:, index]
        pieces = {
            "qweight": words(q.numpy(), bits).T,
            "qzeros": words((zeros - int(not v2)).T.numpy(), bits),
            "scales": scales.T,
            "g_idx": index.int(),
        }
        return Stored(pieces, values)

    return Kind(store, config, form)


def awq(group: int, form: str) -> Kind:
    """AutoAWQ's "gemm"."""

    def packed(values: np.ndarray) -> Tensor:
        """Eight columns to a word: 0, 2, 4, 6, 1, 3, 5, 7, from the lowest bits on."""
        result = np.zeros((len(values), values.shape[1] // 8), np.uint32)
        for place, column in enumerate((0, 2, 4, 6, 1, 3, 5, 7)):
            result |= values[:, column::8].astype(np.uint32) << np.uint32(4 * place)
        return torch.from_numpy(result.view(np.int32))

    def store(shape: tuple[int, int], generator: torch.Generator) -> Stored:
        rows, columns = shape
        q = torch.randint(16, shape, generator=generator)
        zeros = torch.randint(16, (rows, columns // group), generator=generator)
        scales = (_scales((rows, columns // group), columns, generator) / 2).half()
        values = (q - zeros.repeat_interleave(group, 1)) * scales.float().repeat_interleave(
            group, 1
        )
        pieces = {
            "qweight": packed(q.T.numpy()),
            "qzeros": packed(zeros.T.numpy()),
            "scales": scales.T,
        }
        return Stored(pieces, values)

    config = {"quant_method": "awq", "bits": 4, "group_size": group, "version": "gemm"}
    return Kind(store, {**config, "zero_point": True}, form)


def modelopt_nvfp4() -> Kind:
    """ModelOpt's: bytes of two e2m1, e4m3 for sixteen, and ``weight_scale_2`` for all."""

    def store(shape: tuple[int, int], generator: torch.Generator) -> Stored:
        rows, columns = shape
        q = torch.randint(16, shape, generator=generator).numpy()
        scales = (64 + 300 * torch.rand((rows, columns // 16), generator=generator)).to(
            torch.float8_e4m3fn
        )
        factor = torch.rand((), generator=generator) * 1e-4 + 2e-4
        values = torch.from_numpy(E2M1[q]).view(rows, -1, 16) * (scales.float() * factor)[..., None]
        pieces = {
            "weight": torch.from_numpy((q[:, 0::2] | q[:, 1::2] << 4).astype(np.uint8)),
            "weight_scale": scales,
            "weight_scale_2": factor,
            "input_scale": torch.ones(()),
        }
        return Stored(pieces, values.view(shape))

    return Kind(store, {"quant_method": "modelopt", "quant_algo": "NVFP4"}, "nvfp4 U8")


def fp8(scale: str, block: tuple[int, int] | None, *, e8m0: bool = False, **config: Any) -> Kind:
    """e4m3 with a float32 for each block, the last of which may be cut off, or for all.

    With ``e8m0`` an exponent.
    """

    def store(shape: tuple[int, int], generator: torch.Generator) -> Stored:
        height, width = block or shape
        weight = torch.randn(shape, generator=generator).mul(40).to(torch.float8_e4m3fn)
        scales = _scales((-(-shape[0] // height), -(-shape[1] // width)), shape[1], generator) / 10
        if e8m0:
            scales = scales.to(torch.float8_e8m0fnu)
        values = weight.float()
        for row in range(0, shape[0], height):
            for column in range(0, shape[1], width):
                place = slice(row, row + height), slice(column, column + width)
                values[place] *= scales[row // height, column // width].float()
        return Stored({"weight": weight, scale: scales if block else scales.view(())}, values)

    return Kind(store, {"quant_method": "fp8", **config}, "fp8 F32")


def deepseek_v4() -> Kind:
    """int8 of two e2m1 each, the first in the low half, and ``scale`` in ue8m0."""

    def store(shape: tuple[int, int], generator: torch.Generator) -> Stored:
        rows, columns = shape
        q = torch.randint(16, shape, generator=generator).numpy()
        exponents = torch.randint(121, 124, (rows, columns // 32), generator=generator)
        values = E2M1[q].reshape(rows, -1, 32) * np.exp2(exponents.numpy() - 127.0)[..., None]
        packed = (q[:, 0::2] | q[:, 1::2] << 4).astype(np.uint8).view(np.int8)
        pieces = {
            "weight": torch.from_numpy(packed),
            "scale": exponents.to(torch.uint8).view(torch.float8_e8m0fnu),
        }
        return Stored(pieces, torch.from_numpy(values.reshape(shape)))

    config = {"quant_method": "fp8", "weight_block_size": [128, 128], "expert_dtype": "fp4"}
    return Kind(store, config, "mxfp4 U8")


INT4: dict[str, Any] = {"num_bits": 4, "type": "int", "strategy": "group"}

KINDS = {
    "ct-mxfp4": library(
        "mxfp4-pack-quantized", {}, "mxfp4 U8",
        num_bits=4, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8,
    ),
    "ct-nvfp4": library(
        "nvfp4-pack-quantized", {}, "nvfp4 U8",
        num_bits=4, type="float", strategy="tensor_group", group_size=16,
    ),
    "ct-mxfp8": library(
        "mxfp8-quantized", {}, "mxfp8 U8",
        num_bits=8, type="float", strategy="group", group_size=32, scale_dtype=torch.uint8,
    ),
    "ct-fp8-channel": library(
        "float-quantized", {}, "fp8 F32", num_bits=8, type="float", strategy="channel"
    ),
    "modelopt-nvfp4": modelopt_nvfp4(),
    "fp8-blocks": fp8("weight_scale_inv", (96, 96), weight_block_size=[96, 96]),
    "fp8-tensor": fp8("weight_scale", None),
    "ct-int4": library("pack-quantized", {}, "int4g32 BF16", **INT4, group_size=32, symmetric=True),
    "ct-int4-asymmetric": library(
        "pack-quantized", {}, "4g128 BF16", **INT4, group_size=128, symmetric=False
    ),
    "ct-int8-channel": library(
        "pack-quantized", {}, "int8g128 BF16", num_bits=8, type="int", strategy="channel"
    ),
    "ct-int8-bytes": library(
        "int-quantized", {}, "int8g64 BF16", num_bits=8, type="int", strategy="group", group_size=64
    ),
    "ct-int5": library(
        "pack-quantized", {}, "int8g64 BF16",
        num_bits=5, type="int", strategy="group", group_size=64,
    ),
    "gptq": gptq(4, 32, "4g32 F16"),
    "gptq-v2": gptq(4, -1, "4g128 F16", v2=True),
    "gptq-3-bits": gptq(3, 64, "3g64 F16"),
    "awq": awq(64, "4g64 F16"),
}  # fmt: skip
"""By the names that tests have for them."""

DEEPSEEK_V4 = {
    ".ffn.experts.": deepseek_v4(),
    ".ffn.shared_experts.w": fp8("scale", (128, 128), e8m0=True),
    ".attn.w": fp8(
        "scale", (128, 128), e8m0=True, weight_block_size=[128, 128], expert_dtype="fp4"
    ),
}  # fmt: skip
"""What is in each of the two forms, by names; all of the configuration is the last's."""
ACTIVATION_ORDER = gptq(4, 32, "", ordered=True)
