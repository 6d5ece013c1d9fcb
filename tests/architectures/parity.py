"""Our model of a pack beside stock transformers', in one process."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from expertd_inference.experts.cpu import connect, experts_modules, layer_numbers
from expertd_inference.experts.llama4 import adopt_llama4
from expertd_inference.experts.recovery import Recovery
from expertd_inference.kernels.cpu.choice import CpuKernels
from expertd_inference.model.loading import load_trunk
from expertstore.pack.codec import dequantize, record_parts
from expertstore.pack.manifest import GateOrder
from expertstore.pack.reader import PackReader
from tests.inference.pack_source import PackSource


def load(pack: Path, dtype: torch.dtype = torch.bfloat16, kernels: CpuKernels | None = None) -> Any:
    """Our model, computed by ``kernels``, quantized linear layers included.

    Without, by the reference, and its trunk is dequantized.
    """
    source = PackSource(pack)
    linear = None if kernels is None else kernels.linear
    trunk = load_trunk(pack, source.manifest, dtype=dtype, linear=linear)
    recovery = Recovery(source, reattach_seconds=1.0, say=lambda _: None)
    connect(trunk.experts, source.manifest, source, recovery, kernels)
    return trunk.model


@torch.no_grad()
def logits(model: Any, prompt: list[int]) -> Tensor:
    """Of every position of the prompt."""
    result: Tensor = model(torch.tensor([prompt])).logits
    return result


@torch.no_grad()
def fill(model: Any, pack: Path, ours: Any) -> None:
    """Gives a stock ``model`` every weight of ``pack``, dequantized; ``ours`` has its trunk."""
    model.load_state_dict(ours.state_dict(), strict=False)
    adopt_llama4(model)
    named = experts_modules(model)
    modules: dict[int, Any] = dict(zip(layer_numbers(list(named)), named.values(), strict=True))
    with PackReader(pack) as reader:
        manifest = reader.manifest
        layouts = {layer.layer: manifest.layouts[layer.layout] for layer in manifest.layers}
        for place in reader.places():
            layout, module = layouts[place.layer], modules[place.layer]
            record = bytearray(reader.read_record(place.layer, place.expert))
            parts = record_parts(record, layout)
            for matrix in layout.matrices:
                parameter = getattr(module, f"{matrix.name}_proj")
                weight = dequantize(matrix, parts, parameter.dtype)
                if matrix.name == "gate_up" and manifest.gate_order is GateOrder.INTERLEAVED:
                    weight = torch.stack(weight.chunk(2), dim=1).flatten(0, 1)
                parameter[place.expert] = weight.T if module.is_transposed else weight
