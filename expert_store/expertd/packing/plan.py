"""What a pack will consist of, byte by byte, before any weight is read.

All sizes follow from shapes and scheme. So headers are written first, files have their final
size from the start, and each step (an expert, or a tensor of the trunk) has its place: it can
be done, or done again, without looking at the others.
"""

import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import accumulate

from expertd.packing.architecture import Architecture, ExpertsModule
from expertd.packing.checkpoint import Checkpoint
from expertd.packing.checkpoint_files import CheckpointTensor
from expertd.packing.schemes import Precision, Scheme
from expertd.packing.stored.weight import PLAIN_FORM, Form
from expertstore.errors import CheckpointError
from expertstore.pack.layout import (
    DOWN,
    DTYPE_BYTES,
    Encoding,
    Matrix,
    RecordLayout,
    matrix_parts,
    record_layout,
)
from expertstore.pack.manifest import (
    FORMAT_NAME,
    FORMAT_VERSION,
    TRUNK_NAME,
    Layer,
    Manifest,
    PackFile,
    QuantizedTensor,
)
from expertstore.pack.table import Table, TableEncoding, block_shape, row_bytes
from expertstore.pack.tensor_file import build_header

MAX_FILE_BYTES = 4 << 30
_TABLE_STEP_BYTES = 16 << 20
NUM_SAMPLERS = 8
"""Layers whose weights are looked at side by side: on a network, most of that is waiting."""


@dataclass(frozen=True)
class PlannedFile:
    """A file to write: the header's bytes, and its full size."""

    name: str
    header: bytes
    num_bytes: int


@dataclass(frozen=True)
class ExpertStep:
    """Writing one record at ``offset`` of the file with index ``file``."""

    module: ExpertsModule
    expert: int
    layout: RecordLayout
    file: int
    offset: int
    source_bytes: int


@dataclass(frozen=True)
class TrunkStep:
    """Writing one tensor of the trunk; ``matrix`` says how if it is to be quantized."""

    source: CheckpointTensor
    matrix: Matrix | None
    dtype: str
    stays_wide: bool
    """Whether a worker keeps it in ``dtype``, and not in the model's 16-bit type."""
    scales: str
    """The type of the scales of ``matrix``."""
    file: int
    offset: int
    source_bytes: int

    def pieces(self) -> list[tuple[str, tuple[int, ...], str]]:
        """Name, shape and dtype of each tensor that is written, one after the other."""
        if self.matrix is None:
            return [(self.source.name, self.source.entry.shape, self.dtype)]
        return matrix_parts(self.matrix, self.dtype, self.scales)


@dataclass(frozen=True)
class TableStep:
    """Writing ``num_rows`` of a table, from the first of ``first_block`` on."""

    table: Table
    sources: tuple[tuple[CheckpointTensor, int, int], ...]
    """The tensors that have them, each with its first row and how many."""
    first_block: int
    num_rows: int
    file: int
    offset: int
    source_bytes: int

    @property
    def num_blocks(self) -> int:
        """Blocks that they fill."""
        return -(-self.num_rows // self.table.rows_per_block)


PackingStep = ExpertStep | TrunkStep | TableStep


@dataclass(frozen=True)
class PackPlan:
    """All files of weights, the trunk's last, and the steps that fill them."""

    files: tuple[PlannedFile, ...]
    layouts: tuple[RecordLayout, ...]
    steps: tuple[PackingStep, ...]
    misfits: tuple[str, ...] = ()
    """Matrices of the trunk that stay in 16 bits since the scheme does not fit them, and why."""
    tables: tuple[Table, ...] = ()
    """Their files are those before the trunk's."""

    @property
    def num_bytes(self) -> int:
        """Size of all files of weights."""
        return sum(file.num_bytes for file in self.files)


def make_plan(
    checkpoint: Checkpoint,
    scheme: Scheme,
    max_file_bytes: int = MAX_FILE_BYTES,
    table_encoding: TableEncoding = TableEncoding.PLAIN,
) -> PackPlan:
    """Raises :class:`CheckpointError` if the scheme does not fit the checkpoint's sizes."""
    layouts: list[RecordLayout] = []
    records: list[tuple[ExpertsModule, int, RecordLayout]] = []
    modules = checkpoint.architecture.experts
    with ThreadPoolExecutor(NUM_SAMPLERS) as pool:
        found = pool.map(lambda module: _layout(checkpoint, module, scheme.experts), modules)
        of_modules = list(zip(modules, found, strict=True))
    for module, layout in of_modules:
        if layout not in layouts:
            layouts.append(layout)
        records += [(module, expert, layout) for expert in range(module.num_experts)]
    bits = {module.name: checkpoint.expert_bits(module) for module in modules}
    files: list[PlannedFile] = []
    steps: list[PackingStep] = []
    for group in _split(records, max_file_bytes):
        header = build_header(
            [
                (f"layers.{module.layer}.experts.{expert}", "U8", (layout.record_bytes,))
                for module, expert, layout in group
            ]
        )
        offset = len(header)
        for module, expert, layout in group:
            num_weights = (2 + module.has_gate) * module.hidden_size * module.intermediate_size
            source_bytes = int(num_weights * bits[module.name] / 8)
            steps.append(ExpertStep(module, expert, layout, len(files), offset, source_bytes))
            offset += layout.record_bytes
        files.append(PlannedFile(f"experts-{len(files):05d}.safetensors", header, offset))
    tables: list[Table] = []
    for name, sources in checkpoint.tables.items():
        table, header = _plan_table(checkpoint, name, sources, table_encoding, len(tables))
        steps += _table_steps(table, sources, len(files))
        files.append(PlannedFile(table.file, header, table.num_bytes))
        tables.append(table)
    trunk, trunk_steps, misfits = _plan_trunk(checkpoint, scheme, len(files))
    return PackPlan(
        (*files, trunk),
        tuple(layouts),
        (*trunk_steps, *steps),
        tuple(misfits),
        tuple(tables),
    )


def make_manifest(
    plan: PackPlan, checkpoint: Checkpoint, scheme: Scheme, checksums: dict[int, str], trunk: str
) -> Manifest:
    """The finished pack's manifest; ``checksums`` by step, ``trunk`` that of the trunk's file."""
    records: dict[int, list[tuple[ExpertStep, str]]] = {}
    quantized = []
    for index, step in enumerate(plan.steps):
        if isinstance(step, ExpertStep):
            records.setdefault(step.module.layer, []).append((step, checksums[index]))
        elif isinstance(step, TrunkStep) and step.matrix is not None:
            quantized.append(
                QuantizedTensor(name=step.source.name, matrix=step.matrix, dtype=step.dtype)
            )
    layers = tuple(
        Layer(
            layer=layer,
            num_experts=len(steps),
            experts_per_token=steps[0][0].module.experts_per_token,
            layout=plan.layouts.index(steps[0][0].layout),
            files=tuple(step.file for step, _ in steps),
            offsets=tuple(step.offset for step, _ in steps),
            checksums=tuple(checksum for _, checksum in steps),
        )
        for layer, steps in records.items()
    )
    files = tuple(PackFile(name=file.name, num_bytes=file.num_bytes) for file in plan.files)
    return Manifest(
        format=FORMAT_NAME,
        format_version=FORMAT_VERSION,
        architecture=checkpoint.architecture.name,
        model_type=checkpoint.architecture.model_type,
        scheme=scheme.name,
        dtype=checkpoint.dtype,
        gate_order=checkpoint.architecture.experts[0].gate_order,
        layers=layers,
        layouts=plan.layouts,
        files=files[: -1 - len(plan.tables)],
        trunk=files[-1],
        trunk_checksum=trunk,
        trunk_quantized=tuple(quantized),
        tables=plan.tables,
    )


def _layout(checkpoint: Checkpoint, module: ExpertsModule, precision: Precision) -> RecordLayout:
    hidden, intermediate = module.hidden_size, module.intermediate_size
    matrices, scales = [], []
    try:
        for name, rows, columns in (
            (module.inward, (1 + module.has_gate) * intermediate, hidden),
            (DOWN, hidden, intermediate),
        ):
            form = Form(precision)
            if precision.is_kept:
                form = checkpoint.stored_form(module, f"{name}_proj") or PLAIN_FORM
            elif precision.bits:
                own = checkpoint.scale_type(module, f"{name}_proj", precision.bits)
                form = Form(precision, own)
            matrices.append(form.precision.matrix(name, rows, columns))
            scales.append(form.scales)
        return record_layout(
            tuple(matrices), checkpoint.dtype, has_bias=module.has_bias, scales=scales
        )
    except ValueError as error:
        raise CheckpointError(
            f"The experts of layer {module.layer} cannot be written as {precision}: {error}; "
            "choose another precision with --experts."
        ) from error


def _split(
    records: list[tuple[ExpertsModule, int, RecordLayout]], max_file_bytes: int
) -> Iterator[list[tuple[ExpertsModule, int, RecordLayout]]]:
    """The records of each file, in order."""
    group: list[tuple[ExpertsModule, int, RecordLayout]] = []
    num_bytes = 0
    for record in records:
        if group and num_bytes + record[2].record_bytes > max_file_bytes:
            yield group
            group, num_bytes = [], 0
        group.append(record)
        num_bytes += record[2].record_bytes
    yield group


def _plan_table(
    checkpoint: Checkpoint,
    name: str,
    sources: Sequence[CheckpointTensor],
    encoding: TableEncoding,
    number: int,
) -> tuple[Table, bytes]:
    """A table and its file's header. Raises :class:`CheckpointError` if it cannot be written so."""
    num_rows, columns = sum(source.entry.shape[0] for source in sources), sources[0].entry.shape[1]
    try:
        block_bytes, rows_per_block = block_shape(row_bytes(columns, encoding, checkpoint.dtype))
    except ValueError as error:
        raise CheckpointError(
            f"The table {name} of {checkpoint.path} cannot be written as {encoding}: {error}; "
            "choose --tables 16."
        ) from error
    num_blocks = -(-num_rows // rows_per_block)
    header = build_header([(name, "U8", (num_blocks, block_bytes))])
    table = Table(
        name=name,
        file=f"table-{number:05d}.safetensors",
        num_bytes=len(header) + num_blocks * block_bytes,
        offset=len(header),
        num_rows=num_rows,
        num_columns=columns,
        rows_per_token=checkpoint.rows_per_token[name],
        dtype=checkpoint.dtype,
        encoding=encoding,
        block_bytes=block_bytes,
        rows_per_block=rows_per_block,
    )
    return table, header


def _table_steps(
    table: Table, sources: Sequence[CheckpointTensor], file: int
) -> Iterator[TableStep]:
    """As many blocks at a time as are worth a step."""
    blocks = max(1, _TABLE_STEP_BYTES // table.block_bytes)
    ends = [*accumulate(source.entry.shape[0] for source in sources)]
    for block in range(0, table.num_blocks, blocks):
        first = block * table.rows_per_block
        last = min(first + blocks * table.rows_per_block, table.num_rows)
        pieces = []
        for source, end in zip(sources, ends, strict=True):
            begin = end - source.entry.shape[0]
            low, high = max(first, begin), min(last, end)
            if low < high:
                pieces.append((source, low - begin, high - low))
        row = sources[0].entry.num_bytes // max(1, sources[0].entry.shape[0])
        yield TableStep(
            table,
            tuple(pieces),
            block,
            last - first,
            file,
            table.offset + block * table.block_bytes,
            (last - first) * row,
        )


def _plan_trunk(
    checkpoint: Checkpoint, scheme: Scheme, file: int
) -> tuple[PlannedFile, list[TrunkStep], list[str]]:
    precisions = _trunk_precisions(checkpoint.architecture, scheme)
    misfits: list[str] = []
    pending: list[TrunkStep] = []
    for parameter, source in checkpoint.trunk:
        entry = source.entry
        dtype = checkpoint.type_of(source)
        # A float32 checkpoint becomes BF16, but for what transformers itself keeps in float32;
        # float32 tensors of a 16-bit checkpoint are so on purpose.
        wide = dtype in {"F32", "F64"}
        stays_wide = wide and checkpoint.architecture.stays_float32(parameter)
        if wide and checkpoint.is_float32 and not stays_wide:
            dtype = checkpoint.dtype
        matrix, scales = None, "F16"
        precision = precisions.get(parameter)
        if precision is not None and len(entry.shape) == 2:
            form = _trunk_form(checkpoint, source, precision)
            matrix, scales = form.precision.matrix(source.name, *entry.shape), form.scales
            try:
                matrix_parts(matrix, dtype)
            except ValueError as error:
                misfits.append(str(error))
                matrix = None
        elif scheme.dense.is_kept and len(entry.shape) > 1 and checkpoint.trunk_form(source):
            misfits.append(f"{source.name} is stored quantized and is no linear layer")
        if matrix is not None and matrix.encoding is Encoding.PLAIN:
            matrix = None
        pending.append(
            TrunkStep(source, matrix, dtype, stays_wide, scales, file, 0, entry.num_bytes)
        )
    # Wide types first, bytes last: each tensor is then aligned to its type.
    pending.sort(key=lambda step: (step.matrix is not None, -DTYPE_BYTES[step.dtype]))
    pieces = [step.pieces() for step in pending]
    header = build_header([(name, dtype, shape) for each in pieces for name, shape, dtype in each])
    steps = []
    offset = len(header)
    for step, each in zip(pending, pieces, strict=True):
        steps.append(replace(step, offset=offset))
        offset += sum(math.prod(shape) * DTYPE_BYTES[dtype] for _, shape, dtype in each)
    return PlannedFile(TRUNK_NAME, header, offset), steps, misfits


def _trunk_form(checkpoint: Checkpoint, source: CheckpointTensor, precision: Precision) -> Form:
    if precision.is_kept:
        return checkpoint.trunk_form(source) or PLAIN_FORM
    return Form(precision, checkpoint.trunk_scale_type(source, precision.bits))


def _trunk_precisions(architecture: Architecture, scheme: Scheme) -> dict[str, Precision]:
    """The precision of each parameter of the trunk that the scheme wants quantized."""
    parts = (
        (architecture.attention_linears(), scheme.attention),
        (architecture.dense_linears(), scheme.dense),
        (architecture.head(), scheme.head),
        (architecture.vision_linears(), scheme.vision),
    )
    return {
        name: precision
        for names, precision in parts
        if precision.bits or precision.is_kept
        for name in names
    }
