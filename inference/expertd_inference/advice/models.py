"""What a model needs, by scheme: the bytes and the matrices that a token passes.

Exact, since they come from the packer's own plan, or a pack's own manifest.
"""

import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import msgspec

from expertd.packing.checkpoint_files import CONFIG_NAME
from expertd.packing.plan import ExpertStep, PackPlan, TrunkStep, make_plan
from expertd.packing.schemes import SCHEMES
from expertd.packing.synthetic import imagine
from expertd_inference.advice.named import find_named
from expertd_inference.advice.values import ExpertLayers, Need
from expertd_inference.kv.size import kv_bytes_per_token
from expertstore.errors import CheckpointError, PackError
from expertstore.pack.layout import Encoding, Matrix
from expertstore.pack.manifest import Manifest, read_manifest
from expertstore.pack.tensor_file import read_header


@dataclass(frozen=True)
class Model:
    """Something to plan for."""

    name: str
    config: dict[str, Any]
    """Its ``config.json``."""
    needs: tuple[Need, ...]
    """By scheme; a pack's own alone."""
    kv_bytes: int
    """Of keys and values per token of context and worker."""
    pack: Path | None = None
    checkpoint: Path | None = None
    """The directory that is to be packed, if it was named."""


def find_model(text: str) -> Model:
    """The model that ``text`` names, as :func:`~expertd_inference.advice.named.find_named` says.

    Raises InvalidInputError (PackError, CheckpointError) in a sentence that says what to give.
    """
    named = find_named(text)
    if named.is_pack:
        return _of_pack(Path(text))
    if named.config is None:
        return replace(_of_config(named.name, Path(text)), checkpoint=Path(text))
    with tempfile.TemporaryDirectory(prefix="expertd-") as folder:
        (Path(folder) / CONFIG_NAME).write_bytes(named.config)
        return _of_config(named.name, Path(folder))


def _of_config(name: str, directory: Path) -> Model:
    checkpoint: Any = imagine(directory)
    needs = []
    for scheme in SCHEMES.values():
        if scheme.experts.is_kept and not checkpoint.is_quantized:
            continue  # as it is, it is `bf16`
        try:
            needs.append(_need_of_plan(scheme.name, make_plan(checkpoint, scheme)))
        except CheckpointError:
            continue  # the scheme does not fit its sizes
    if kept := next((need for need in needs if SCHEMES[need.scheme].experts.is_kept), None):
        # To make anything else of it loses precision, and is only for fewer bits.
        needs = [need for need in needs if need is kept or need.expert_bits < kept.expert_bits]
    config = msgspec.json.decode((directory / CONFIG_NAME).read_bytes())
    return Model(
        name, config, tuple(needs), kv_bytes_per_token(checkpoint.architecture.model.config)
    )


def _need_of_plan(scheme: str, plan: PackPlan) -> Need:
    groups: Counter[tuple[int, int, int]] = Counter()
    seen: set[int] = set()
    linears: list[Matrix] = []
    names: list[str] = []
    for step in plan.steps:
        if isinstance(step, ExpertStep):
            module = step.module
            if module.layer not in seen:
                seen.add(module.layer)
                key = module.num_experts, module.experts_per_token, plan.layouts.index(step.layout)
                groups[key] += 1
        elif isinstance(step, TrunkStep):
            names.append(step.source.name)
            linears += _linear(step.source.name, step.source.entry.shape, step.matrix)
    return Need(
        scheme,
        tuple(
            ExpertLayers(count, num_experts, top_k, plan.layouts[layout])
            for (num_experts, top_k, layout), count in groups.items()
        ),
        _counted(linears, names),
        plan.files[-1].num_bytes,
        table_bytes=sum(table.num_bytes for table in plan.tables),
    )


def _of_pack(path: Path) -> Model:
    manifest = read_manifest(path).manifest
    checkpoint = imagine(path)
    config = msgspec.json.decode((path / CONFIG_NAME).read_bytes())
    return Model(
        path.resolve().name,
        config,
        (_need_of_pack(path, manifest),),
        kv_bytes_per_token(checkpoint.architecture.model.config),
        path,
    )


def _need_of_pack(path: Path, manifest: Manifest) -> Need:
    groups = Counter(
        (layer.num_experts, layer.experts_per_token, layer.layout) for layer in manifest.layers
    )
    try:
        entries = read_header(path / manifest.trunk.name)
    except (OSError, ValueError) as error:
        raise PackError(
            f"{path / manifest.trunk.name} cannot be read ({error}); make the pack again."
        ) from error
    linears: list[Matrix] = []
    quantized = {tensor.name for tensor in manifest.trunk_quantized}
    for tensor in manifest.trunk_quantized:
        linears += _linear(tensor.name, (), tensor.matrix)
    for entry in entries.values():
        if not any(entry.name.startswith(f"{name}.") for name in _owners(entry.name) & quantized):
            linears += _linear(entry.name, entry.shape, None)
    return Need(
        manifest.scheme,
        tuple(
            ExpertLayers(count, num_experts, top_k, manifest.layouts[layout])
            for (num_experts, top_k, layout), count in groups.items()
        ),
        _counted(linears, [*entries]),
        manifest.trunk.num_bytes,
        manifest.dtype,
        manifest.table_bytes,
    )


def _owners(name: str) -> set[str]:
    """All names that ``name`` could be a part of."""
    pieces = name.split(".")
    return {".".join(pieces[:count]) for count in range(1, len(pieces))}


def _linear(name: str, shape: tuple[int, ...], matrix: Matrix | None) -> list[Matrix]:
    """The matrix without its name; none for what is no matrix."""
    if matrix is None:
        if len(shape) != 2:
            return []
        matrix = Matrix(
            name=name, encoding=Encoding.PLAIN, out_features=shape[0], in_features=shape[1]
        )
    return [msgspec.structs.replace(matrix, name="embed" if "embed" in name else "w")]


def _counted(linears: list[Matrix], names: Iterable[str]) -> tuple[tuple[Matrix, int], ...]:
    """Of the embeddings a token reads a row; they count only if they are the head as well."""
    has_head = any(name.startswith(("lm_head", "output")) or ".lm_head" in name for name in names)
    kept = [
        msgspec.structs.replace(matrix, name="w")
        for matrix in linears
        if matrix.name == "w" or not has_head
    ]
    return tuple(Counter(kept).items())
