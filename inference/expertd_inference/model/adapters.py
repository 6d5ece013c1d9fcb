"""Adapters in peft's format, over the one model of a worker."""

import threading
from collections import OrderedDict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor, nn

from expertd_inference.experts.adapting import (
    AdaptedExperts,
    Adapter,
    LowRankWeights,
    add_to_linear,
)
from expertd_inference.model.adapted_experts import ExpertParts, experts_parts
from expertd_inference.model.quantized_linear import QuantizedLinear
from expertstore.adapter import AdapterFiles, LowRank, read_adapter
from expertstore.errors import AdapterError

MAX_OPEN = 512
"""Adapters; of more the least recently used are opened again."""

Identity = tuple[int, int, int]


class Adapters:
    """Those that sequences of one model are computed with, each opened when it is first asked for.

    Their weights are mapped from their files, so workers share them and the host may drop them;
    the model's own are never touched. It may be used by several threads.
    """

    def __init__(self, model: nn.Module, *, exact: bool = False) -> None:
        """With ``exact`` the bits of a row do not depend on the other rows."""
        self._model = model
        self._exact = exact
        self._open: OrderedDict[str, tuple[Identity, Adapter]] = OrderedDict()
        self._hooked: set[nn.Module] = set()
        self._lock = threading.Lock()

    def open(self, directory: str) -> Adapter:
        """The adapter in a directory, as it is there now.

        Raises AdapterError if it is none, or of another base.
        """
        path = Path(directory)
        files = read_adapter(path)
        identity = _identity(files)
        with self._lock:
            known = self._open.get(directory)
            if known is not None and known[0] == identity:
                self._open.move_to_end(directory)
                return known[1]
            adapter = self._load(files, f"\0adapter {directory} {identity}")
            self._open[directory] = identity, adapter
            while len(self._open) > MAX_OPEN:
                self._open.popitem(last=False)
            return adapter

    def _load(self, files: AdapterFiles, key: str) -> Adapter:
        modules = dict(self._model.named_modules())
        linears: dict[nn.Module, LowRankWeights] = {}
        experts: dict[int, ExpertParts] = {}
        try:
            with safe_open(files.weights, framework="pt") as weights:
                for part in files.parts:
                    a, b = (weights.get_tensor(each.name) for each in (part.a, part.b))
                    _check_finite(files, part, a, b)
                    found = experts_parts(files, part, a, b, modules)
                    if found is None:
                        module = _linear_of(files, part, modules)
                        linears[module] = LowRankWeights(a, b, part.scale)
                        continue
                    of_layer = experts.setdefault(found[0], {})
                    for place, added in found[1].items():
                        of_layer.setdefault(place, []).extend(added)
        except OSError as error:
            raise AdapterError(f"{files.weights} cannot be read: {error}.") from error
        for module in linears.keys() - self._hooked:
            module.register_forward_hook(partial(_add, exact=self._exact))
            self._hooked.add(module)
        layers = {layer: AdaptedExperts(of, self._exact) for layer, of in experts.items()}
        return Adapter(key, linears, layers)


def _linear_of(files: AdapterFiles, part: LowRank, modules: Mapping[str, nn.Module]) -> nn.Module:
    module = modules.get(part.module)
    if not isinstance(module, nn.Linear | QuantizedLinear):
        raise AdapterError(
            f"{files.directory} adds to {part.module}, which is no linear layer of this model; it "
            f"was trained on {files.base or 'another base'}."
        )
    if part.module == "lm_head":
        raise AdapterError(
            f"{files.directory} adds to the output head, which is not known here; train without "
            "lm_head."
        )
    wanted = module.in_features, module.out_features
    has = part.a.shape[1], part.b.shape[0]
    if wanted != has:
        raise AdapterError(
            f"{files.directory} is of another base: {part.module} has {has[0]} inputs and {has[1]} "
            f"outputs there, and {wanted[0]} and {wanted[1]} in this model."
        )
    return module


def _check_finite(files: AdapterFiles, part: LowRank, *weights: Tensor) -> None:
    if not all(bool(each.isfinite().all()) for each in weights):
        raise AdapterError(
            f"{files.directory} has weights of {part.module} that are not finite; train it again."
        )


def _add(module: nn.Module, rows: tuple[Any, ...], out: Tensor, *, exact: bool) -> Tensor:
    return add_to_linear(module, rows[0], out, row_by_row=exact)


def _identity(files: AdapterFiles) -> Identity:
    try:
        status = files.weights.stat()
    except OSError as error:
        raise AdapterError(f"{files.weights} cannot be read: {error.strerror}.") from error
    return status.st_ino, status.st_size, status.st_mtime_ns
