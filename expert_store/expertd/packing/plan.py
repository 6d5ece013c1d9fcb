"""What a pack will consist of, byte by byte, before any weight is read.

All sizes follow from shapes and scheme. So headers are written first, files have their final
size from the start, and each step (an expert, or a tensor of the trunk) has its place: it can
be done, or done again, without looking at the others.
"""

import math
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

from expertd.packing.architecture import Architecture, ExpertsModule
from expertd.packing.checkpoint import Checkpoint
from expertd.packing.checkpoint_files import CheckpointTensor
from expertd.packing.schemes import Precision, Scheme
from expertd.packing.stored.weight import PLAIN_FORM, Form
from expertstore.errors import CheckpointError
from expertstore.pack.layout import (
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
from expertstore.pack.tensor_file import build_header

MAX_FILE_BYTES = 4 << 30
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


PackingStep = ExpertStep | TrunkStep


@dataclass(frozen=True)
class PackPlan:
    """All files of weights, the trunk's last, and the steps that fill them."""

    files: tuple[PlannedFile, ...]
    layouts: tuple[RecordLayout, ...]
    steps: tuple[PackingStep, ...]
    misfits: tuple[str, ...] = ()
    """Matrices of the trunk that stay in 16 bits since the scheme does not fit them, and why."""

    @property
    def num_bytes(self) -> int:
        """Size of all files of weights."""
        return sum(file.num_bytes for file in self.files)


def make_plan(
    checkpoint: Checkpoint, scheme: Scheme, max_file_bytes: int = MAX_FILE_BYTES
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
            num_weights = 3 * module.hidden_size * module.intermediate_size
            source_bytes = int(num_weights * bits[module.name] / 8)
            steps.append(ExpertStep(module, expert, layout, len(files), offset, source_bytes))
            offset += layout.record_bytes
        files.append(PlannedFile(f"experts-{len(files):05d}.safetensors", header, offset))
    trunk, trunk_steps, misfits = _plan_trunk(checkpoint, scheme, len(files))
    return PackPlan((*files, trunk), tuple(layouts), (*trunk_steps, *steps), tuple(misfits))


def make_manifest(
    plan: PackPlan, checkpoint: Checkpoint, scheme: Scheme, checksums: dict[int, str], trunk: str
) -> Manifest:
    """The finished pack's manifest; ``checksums`` by step, ``trunk`` that of the trunk's file."""
    records: dict[int, list[tuple[ExpertStep, str]]] = {}
    quantized = []
    for index, step in enumerate(plan.steps):
        if isinstance(step, ExpertStep):
            records.setdefault(step.module.layer, []).append((step, checksums[index]))
        elif step.matrix is not None:
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
        files=files[:-1],
        trunk=files[-1],
        trunk_checksum=trunk,
        trunk_quantized=tuple(quantized),
    )


def _layout(checkpoint: Checkpoint, module: ExpertsModule, precision: Precision) -> RecordLayout:
    hidden, intermediate = module.hidden_size, module.intermediate_size
    matrices, scales = [], []
    try:
        for name, rows, columns in (
            ("gate_up", 2 * intermediate, hidden),
            ("down", hidden, intermediate),
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
