"""Which part of the trunk goes to which device, so that it lies beside the experts' cache."""

import re
from collections.abc import Iterable, Mapping

_LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")
"""Up to the first number: ``model.layers.3``."""


def trunk_map(modules: Iterable[str], placed: Mapping[int, str]) -> dict[str, str]:
    """A device map for transformers.

    ``modules`` are the names of those that have tensors of their own, in the model's order;
    ``placed`` says where each MoE layer computes. A layer without experts goes where the last one
    before it with experts is; what comes before the layers to the first device, what comes after
    them to the last. One device takes everything.
    """
    names = list(dict.fromkeys(placed.values()))
    if len(names) == 1:
        return {"": names[0]}
    devices: dict[str, str] = {}
    current = names[0]
    for module in modules:
        match = _LAYER.match(module)
        if match is None:
            devices[module] = current
            continue
        layer = match.group(1)
        number = int(layer.rpartition(".")[2])
        before = [place for place in sorted(placed) if place <= number]
        current = placed[before[-1]] if before else names[0]
        devices[layer] = current
    return devices
