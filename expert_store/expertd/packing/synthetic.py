"""Packs of real models' shapes, made on the spot from random bytes.

Nothing is quantized: the packed bytes themselves are drawn, with scales such that the weights
they stand for keep activations at unit variance, and the residual branches damped, so that
routing spreads evenly over the experts and a long generation stays finite. What such a pack
says is noise, and what it costs is what the real model costs.

An expert's record is one of a few that lie in the file; every expert is loaded into RAM on its
own all the same, so the computation meets as many different bytes as the real model's does. To
measure disks give ``distinct_records=None``.
"""

import json
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from xxhash import xxh3_64, xxh3_64_hexdigest

from expertd.packing.architecture import Architecture, ExpertsModule, read_architecture
from expertd.packing.checkpoint import MIN_TABLE_BYTES
from expertd.packing.checkpoint_files import CONFIG_NAME, CheckpointTensor, read_config
from expertd.packing.plan import (
    ExpertStep,
    PackPlan,
    PlannedFile,
    TrunkStep,
    make_manifest,
    make_plan,
)
from expertd.packing.schemes import Scheme, choose_scheme
from expertd.packing.shapes import shape_config
from expertd.packing.stored.description import Description, read_description
from expertd.packing.stored.expected import expected_form
from expertd.packing.stored.weight import Form
from expertstore.pack.codec import E2M1, E8M0_BIAS, TORCH_DTYPES, record_parts
from expertstore.pack.layout import (
    DOWN,
    DTYPE_BYTES,
    Encoding,
    Matrix,
    RecordLayout,
    matrix_parts,
)
from expertstore.pack.manifest import MANIFEST_NAME, encode_manifest
from expertstore.pack.rows import encode_rows
from expertstore.pack.table import CHECKSUM_BYTES, Table, block_checksum
from expertstore.pack.tensor_file import TensorEntry, build_header

BRANCH_GAIN = 0.1
"""Of what attention and experts add to the residual stream, whose variance is 1: tokens must
stay different from each other through all layers, or all would be routed alike."""

_DTYPE = "BF16"
_ROW_VALUES = 4 << 20
"""Drawn for a table, whose rows repeat after so many values."""


@dataclass(frozen=True)
class ImaginedCheckpoint:
    """What the packer's plan asks of a checkpoint, without one."""

    path: Path
    architecture: Architecture
    trunk: list[tuple[str, CheckpointTensor]]
    dtype: str = _DTYPE
    description: Description = field(default_factory=lambda: Description({}))
    """How its weights are quantized."""
    is_float32: bool = False
    tables: Mapping[str, Sequence[CheckpointTensor]] = field(default_factory=dict)
    rows_per_token: Mapping[str, int] = field(default_factory=dict)

    def type_of(self, source: CheckpointTensor) -> str:
        """What the tensor is read as."""
        return source.entry.dtype

    def scale_type(self, module: ExpertsModule, leaf: str, bits: int) -> str:
        """The type of scales of weights of usual size."""
        return "F16"

    def trunk_scale_type(self, tensor: CheckpointTensor, bits: int) -> str:
        """The same."""
        return "F16"

    def expert_bits(self, module: ExpertsModule) -> float:
        """Bits of a weight of an expert."""
        return 16.0

    @property
    def is_quantized(self) -> bool:
        """Whether the configuration has the experts in a form that records hold."""
        return any(
            self.stored_form(module, leaf) is not None
            for module in self.architecture.experts
            for leaf in (f"{module.inward}_proj", f"{DOWN}_proj")
        )

    def stored_form(self, module: ExpertsModule, leaf: str) -> Form | None:
        """The form that the configuration tells of."""
        hidden, intermediate = module.hidden_size, module.intermediate_size
        is_down = leaf == f"{DOWN}_proj"
        shape = (hidden, intermediate) if is_down else (intermediate, hidden)
        form = expected_form(self.description, module.parameter(leaf), shape)
        return form and (form if is_down or not module.has_gate else form.with_rows(intermediate))

    def trunk_form(self, tensor: CheckpointTensor) -> Form | None:
        """The same for a matrix of the trunk."""
        rows, columns = tensor.entry.shape[-2:]
        return expected_form(self.description, tensor.name, (rows, columns))


def make_pack(
    directory: Path,
    shape: str | Mapping[str, Any],
    scheme: str | Scheme,
    layers: int | None = None,
    *,
    distinct_records: int | None = 8,
    overrides: Mapping[str, Any] | None = None,
    own_places: bool = False,
) -> Path:
    """Writes a pack of ``shape`` to ``directory``, which must not be there; returns it.

    ``shape`` is one of :data:`~.shapes.SHAPES`, or a configuration. ``scheme`` is one of the
    packer's, by name or made; ``layers`` cuts the model; ``overrides`` replace fields of its
    configuration. Of each layout only ``distinct_records`` records are written, and shared by all
    experts; None writes one per expert. With ``own_places`` each expert has its own in the file all
    the same, where a copy is written: to measure disks with large models, which take long to draw.
    Equal arguments give equal bytes. Raises InvalidInputError for an unknown shape.
    """
    directory.mkdir(parents=True)
    config = config_of(shape, layers, overrides)
    (directory / "config.json").write_text(json.dumps(config, indent=1))
    checkpoint: Any = imagine(directory)
    chosen = scheme if isinstance(scheme, Scheme) else choose_scheme(scheme)
    plan = make_plan(checkpoint, chosen)
    if distinct_records is not None and not own_places:
        plan = _shared(plan, distinct_records)
    generator = torch.Generator().manual_seed(0)
    for file in plan.files:
        with (directory / file.name).open("wb") as out:
            out.write(file.header)
            out.truncate(file.num_bytes)
    copies = distinct_records if own_places else None
    checksums = _write_records(directory, plan, generator, copies)
    for table in plan.tables:
        write_table(directory / table.file, table)
    trunk = _write_trunk(directory, plan, generator)
    manifest = make_manifest(plan, checkpoint, chosen, checksums, trunk)
    (directory / MANIFEST_NAME).write_bytes(encode_manifest(manifest))
    return directory


def config_of(
    shape: str | Mapping[str, Any],
    layers: int | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The fields of ``config.json`` of ``shape``, cut and changed as :func:`make_pack` says."""
    config = {**(shape_config(shape) if isinstance(shape, str) else shape), **(overrides or {})}
    if layers is not None:
        config["num_hidden_layers"] = layers
    return config


def plan_of(shape: str | Mapping[str, Any], scheme: Scheme) -> PackPlan:
    """How a pack of ``shape`` would be laid out; its last file is the trunk."""
    with tempfile.TemporaryDirectory(prefix="expertd-") as name:
        directory = Path(name)
        (directory / CONFIG_NAME).write_text(json.dumps(config_of(shape)))
        checkpoint: Any = imagine(directory)
        return make_plan(checkpoint, scheme)


def imagine(directory: Path) -> ImaginedCheckpoint:
    """The checkpoint that would go with the ``config.json`` in ``directory``.

    It has all that :func:`~.plan.make_plan` looks at. Raises CheckpointError as
    :func:`~.architecture.read_architecture` does.
    """
    architecture = read_architecture(directory)
    experts = {name for module in architecture.experts for name in module.parameters()}
    rows_per_token = architecture.tables(MIN_TABLE_BYTES)
    trunk, tables = [], {}
    for name, parameter in _tensors(architecture.model):
        if name in experts:
            continue
        num_bytes = parameter.numel() * DTYPE_BYTES[_DTYPE]
        entry = TensorEntry(name, _DTYPE, tuple(parameter.shape), 0, num_bytes)
        if name in rows_per_token:
            tables[name] = [CheckpointTensor(directory, entry)]
        else:
            trunk.append((name, CheckpointTensor(directory, entry)))
    description = read_description(directory, read_config(directory))
    return ImaginedCheckpoint(
        directory,
        architecture,
        trunk,
        description=description,
        tables=tables,
        rows_per_token=rows_per_token,
    )


def _tensors(model: Any) -> Iterator[tuple[str, Tensor]]:  # noqa: ANN401 - transformers is untyped
    """What a checkpoint of ``model`` has; tied parameters once."""
    yield from model.named_parameters()
    kept = model.state_dict()
    yield from ((name, buffer) for name, buffer in model.named_buffers() if name in kept)


def _shared(plan: PackPlan, distinct_records: int) -> PackPlan:
    """The plan with all experts of a layout in a few records of one file."""
    places: dict[tuple[int, int], int] = {}
    tensors: list[tuple[str, str, tuple[int, ...]]] = []
    end = 0
    for number, layout in enumerate(plan.layouts):
        for index in range(distinct_records):
            places[number, index] = end
            tensors.append((f"{number}.{index}", "U8", (layout.record_bytes,)))
            end += layout.record_bytes
    header = build_header(tensors)
    steps: list[Any] = []
    for step in plan.steps:
        if isinstance(step, ExpertStep):
            place = places[plan.layouts.index(step.layout), step.expert % distinct_records]
            steps.append(replace(step, file=0, offset=len(header) + place))
        elif isinstance(step, TrunkStep):
            steps.append(replace(step, file=1 + len(plan.tables)))
    records = PlannedFile("experts-00000.safetensors", header, len(header) + end)
    others = plan.files[-1 - len(plan.tables) :]
    return PackPlan((records, *others), plan.layouts, tuple(steps), tables=plan.tables)


def _write_records(
    directory: Path, plan: PackPlan, generator: torch.Generator, copies: int | None
) -> dict[int, str]:
    """Writes each place once, if ``copies`` one of so many records; the checksums by step."""
    done: dict[tuple[int, int], str] = {}
    drawn: dict[tuple[int, int], tuple[bytearray, str]] = {}
    checksums = {}
    for number, step in enumerate(plan.steps):
        if not isinstance(step, ExpertStep):
            continue
        place = step.file, step.offset
        if place not in done:
            kind = plan.layouts.index(step.layout), step.expert % (copies or 1)
            if copies is None or kind not in drawn:
                record = _draw_record(step.layout, generator)
                drawn[kind] = record, xxh3_64_hexdigest(record)
            record, done[place] = drawn[kind]
            with (directory / plan.files[step.file].name).open("r+b") as out:
                out.seek(step.offset)
                out.write(record)
        checksums[number] = done[place]
    return checksums


def _draw_record(layout: RecordLayout, generator: torch.Generator) -> bytearray:
    record = bytearray(layout.record_bytes)
    parts = record_parts(record, layout)
    for matrix in layout.matrices:
        gain = BRANCH_GAIN if matrix.name == "down" else 1.0
        fill(matrix, parts, gain, generator)
    return record


def write_table(path: Path, table: Table) -> None:
    """Fills a file that has its header and its size: random rows, which are repeated."""
    random = np.random.default_rng(0).standard_normal(_ROW_VALUES, np.float32)
    values = torch.from_numpy(random[: _ROW_VALUES // table.num_columns * table.num_columns])
    drawn = encode_rows(values.view(-1, table.num_columns), table.encoding, table.dtype)
    used = table.rows_per_block * table.row_bytes
    blocks = drawn.view(-1)[: drawn.numel() // used * used].view(-1, used).numpy()
    data = np.zeros((len(blocks), table.block_bytes), np.uint8)
    data[:, :used] = blocks
    with path.open("r+b") as out:
        out.seek(table.offset)
        for first in range(0, table.num_blocks, len(data)):
            part = data[: table.num_blocks - first]
            for index, block in enumerate(part):
                checksum = block_checksum(block.data, first + index)
                block[-CHECKSUM_BYTES:] = np.frombuffer(checksum.to_bytes(8, "little"), np.uint8)
            out.write(part.data)


def _write_trunk(directory: Path, plan: PackPlan, generator: torch.Generator) -> str:
    path = directory / plan.files[-1].name
    with path.open("r+b") as out:
        for step in plan.steps:
            if isinstance(step, TrunkStep):
                out.seek(step.offset)
                for tensor in _trunk_tensors(step, generator):
                    out.write(tensor.contiguous().view(-1).view(torch.uint8).numpy().data)
    state = xxh3_64()
    with path.open("rb") as file:
        while chunk := file.read(1 << 24):
            state.update(chunk)
    return state.hexdigest()


def _trunk_tensors(step: TrunkStep, generator: torch.Generator) -> list[Tensor]:
    name, shape = step.source.name, step.source.entry.shape
    gain = BRANCH_GAIN if ".o_proj." in name or ".down_proj." in name else 1.0
    if step.matrix is not None:
        parts = {
            part: torch.empty(part_shape, dtype=TORCH_DTYPES[dtype])
            for part, part_shape, dtype in matrix_parts(step.matrix, step.dtype)
        }
        fill(step.matrix, parts, gain, generator)
        return list(parts.values())
    dtype = TORCH_DTYPES[step.dtype]
    if len(shape) == 1:
        return [torch.full(shape, 1.0 if "norm" in name else 0.0, dtype=dtype)]
    deviation = 1.0 if "embed" in name else gain / math.sqrt(shape[-1])
    # Drawn once and repeated: a large model has hundreds of millions.
    noise = torch.randn(min(math.prod(shape), (1 << 24) - 3), generator=generator).mul(deviation)
    count = -(-math.prod(shape) // len(noise))
    return [noise.to(dtype).repeat(count)[: math.prod(shape)].view(shape)]


def fill(
    matrix: Matrix, parts: Mapping[str, Tensor], gain: float, generator: torch.Generator
) -> None:
    """Draws the parts of ``matrix``: weights of mean 0 and deviation ``gain / sqrt(in)``."""
    deviation = gain / math.sqrt(matrix.in_features)
    name = matrix.name
    if matrix.encoding is Encoding.PLAIN:
        weight = parts[f"{name}.weight"]
        weight.copy_(torch.randn(weight.shape, generator=generator).mul_(deviation))
    elif matrix.encoding is not Encoding.HQQ:
        _fill_kept(matrix, parts, deviation, generator)
    else:
        parts[f"{name}.q"].random_(0, 256, generator=generator)
        levels = 1 << matrix.bits
        # The deviation of integers drawn evenly from 0 to levels - 1.
        scale = deviation / math.sqrt((levels**2 - 1) / 12)
        _fill_groups(matrix, parts, "scale", scale, generator)
        _fill_groups(matrix, parts, "zero", (levels - 1) / 2, generator)
    if f"{name}.bias" in parts:
        parts[f"{name}.bias"].zero_()


def _fill_kept(
    matrix: Matrix, parts: Mapping[str, Tensor], deviation: float, generator: torch.Generator
) -> None:
    """As :func:`fill`, of what only checkpoints have."""
    encoding, name = matrix.encoding, matrix.name
    q, scale = parts[f"{name}.q"], parts[f"{name}.scale"]
    if encoding in {Encoding.FP8, Encoding.MXFP8}:
        usual = 64.0
        drawn = torch.randn(q.shape, generator=generator).mul_(usual).clamp_(-448, 448)
        q.copy_(drawn.to(torch.float8_e4m3fn).view(torch.uint8))
    else:
        q.random_(0, 256, generator=generator)
        levels = torch.arange(1 << matrix.bits) - (1 << matrix.bits - 1) + 0.0
        usual = float((levels if encoding is Encoding.INT else torch.tensor(E2M1)).square().mean())
        usual = math.sqrt(usual)
    factor = deviation / usual
    if encoding in {Encoding.MXFP4, Encoding.MXFP8}:
        scale.fill_(E8M0_BIAS + round(math.log2(factor)))
    elif encoding is Encoding.NVFP4:
        scale.copy_(torch.ones(()).to(torch.float8_e4m3fn).view(torch.uint8))
        parts[f"{name}.global"].fill_(factor)
    else:
        around = torch.rand(scale.shape, generator=generator).mul_(0.2).add_(0.9)
        scale.copy_(around.mul_(factor))


def _fill_groups(
    matrix: Matrix,
    parts: Mapping[str, Tensor],
    which: str,
    value: float,
    generator: torch.Generator,
) -> None:
    """Scales or zeros within a tenth of ``value``."""
    name = f"{matrix.name}.{which}"
    if matrix.meta_group_size:
        # (q - zero) * scale, from 0.9 to 1.1 values.
        parts[f"{name}.q"].random_(0, 256, generator=generator)
        parts[f"{name}.scale"].fill_(value * 0.2 / 255)
        parts[f"{name}.zero"].fill_(-0.9 / (0.2 / 255))
    else:
        parts[name].copy_(
            torch.rand(parts[name].shape, generator=generator).mul_(0.2 * value).add_(0.9 * value)
        )
