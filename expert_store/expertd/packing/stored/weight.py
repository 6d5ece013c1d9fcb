"""A weight that a checkpoint holds quantized, in several tensors: plain data, no torch."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import StrEnum
from math import gcd
from pathlib import Path

from expertd.packing.checkpoint_files import CheckpointTensor
from expertd.packing.schemes import GROUP_SIZES, Precision
from expertstore.errors import CheckpointError
from expertstore.pack.layout import Encoding
from expertstore.pack.tensor_file import TensorEntry


class Packing(StrEnum):
    """How the tensors of a stored weight make up its values; the name is for users."""

    MXFP4_BLOCKS = "MXFP4"
    """GPT-OSS: ``blocks`` [..., out, in / 32, 16], two nibbles a byte, the first in the low half,
    and ``scales`` [..., out, in / 32], exponents (E8M0)."""
    MXFP4 = "MXFP4 in rows"
    """``packed`` [..., out, in / 2] with the same nibbles, ``scales`` [..., out, in / 32]."""
    INTEGERS = "compressed-tensors"
    """``packed`` int32 [..., out, in * bits / 32], element i from bit i * bits of its row on, plus
    2 ** (bits - 1), or int8 [..., out, in]; ``scales`` [..., out, groups]; perhaps ``zeros``,
    packed likewise along their columns, and ``order``, the group of each input."""
    GPTQ = "GPTQ"
    """``packed`` int32 [in * bits / 32, out], along its rows; ``scales`` [groups, out]; ``zeros``
    [groups, out * bits / 32], one less than they are; ``order`` as above."""
    GPTQ_V2 = "GPTQ v2"
    """The same with zeros as they are."""
    AWQ = "AWQ"
    """``packed`` int32 [in, out / 8] of 4 bits in the order 0, 2, 4, 6, 1, 3, 5, 7, ``zeros``
    [groups, out / 8] likewise, ``scales`` [groups, out]."""
    NVFP4 = "NVFP4"
    """``packed`` [..., out, in / 2] as MXFP4's, ``scales`` [..., out, in / 16] (e4m3) and a factor
    ``global`` of them."""
    NVFP4_DIVISOR = "NVFP4 in compressed-tensors"
    """The same with the reciprocal of the factor."""
    FP8 = "FP8"
    """``weight`` [..., out, in] (e4m3) and ``scales``, a factor per block of it."""
    MXFP8 = "MXFP8"
    """The same in blocks of 32 along the rows, with exponents (E8M0)."""
    GGUF = "GGUF"
    """Rows of blocks: :class:`expertd.packing.gguf.weight.GgufWeight`."""


@dataclass(frozen=True)
class Form:
    """The form of a matrix in a record, in which a stored weight is held exactly."""

    precision: Precision
    scales: str = "F16"
    """The type of the scales of integers."""

    def with_rows(self, num_rows: int) -> "Form":
        """Of a matrix that is made of several of ``num_rows`` rows, one below the other.

        Where that cuts blocks of FP8, they are smaller ones.
        """
        rows = gcd(self.precision.group_rows, num_rows)
        return replace(self, precision=replace(self.precision, group_rows=rows))


PLAIN_FORM = Form(Precision())
"""In 16 bits: of what is not stored quantized."""


@dataclass(frozen=True)
class StoredWeight:
    """The weight ``name``, as if the checkpoint had it as one tensor of ``shape``."""

    name: str
    shape: tuple[int, ...]
    """[out, in], or [experts, out, in]; as the model's parameter has it."""
    packing: Packing
    pieces: Mapping[str, CheckpointTensor]
    """The tensors that it is made of, by their parts in it. Those of a weight of all experts have
    the experts first, too."""
    form: Form | None
    """The form in which a record holds it bit for bit; None if none does."""
    why_not: str = ""
    """Clause that says why there is none, such as "it has groups of 24"."""
    head: Mapping[str, int] = field(default_factory=dict)
    """How many leading rows of each piece make the smallest matrix of its own: for samples."""
    is_transposed: bool = False
    """Whether the pieces are those of matrices [out, in], and ``shape`` is [experts, in, out]."""
    bits: int = 0
    """Of integers."""

    @property
    def kind(self) -> str:
        """How it is stored, for users."""
        return str(self.packing)

    @property
    def nearest(self) -> Precision | None:
        """What it is quantized to where the scheme keeps what it can, if no form keeps this.

        None: nothing; a user has to choose.
        """
        return None

    @property
    def is_fused(self) -> bool:
        """Whether it is that of all experts."""
        return len(self.shape) == 3

    @property
    def num_rows(self) -> int:
        """Of one matrix of it: outputs."""
        return self.shape[-1 if self.is_transposed else -2]

    @property
    def tensor(self) -> CheckpointTensor:
        """It as one tensor, for all that only looks at names and shapes: it has no bytes."""
        first = next(iter(self.pieces.values()))
        num_bytes = sum(piece.entry.num_bytes for piece in self.pieces.values())
        return CheckpointTensor(
            first.file, TensorEntry(self.name, self.kind, self.shape, 0, num_bytes)
        )

    @property
    def dtype(self) -> str:
        """The 16-bit type that has the range of its values, in safetensors' names."""
        scales = self.pieces.get("scales")
        return "F16" if scales is not None and scales.entry.dtype == "F16" else "BF16"

    def exact_form(self, path: Path) -> Form:
        """``form``. Raises :class:`CheckpointError` if there is none."""
        if self.form is None:
            raise CheckpointError(
                f"{path} has {self.name} in a form ({self.kind}) that no pack holds as it is: "
                f"{self.why_not}; --scheme 4bit, or --experts 4g64 and the like, quantizes it anew."
            )
        return self.form


def fp8_form(block: tuple[int, int]) -> Form:
    """The form of FP8 whose blocks of rows and columns share a scale."""
    rows, columns = block
    return Form(Precision(8, columns, encoding=Encoding.FP8, group_rows=rows), "F32")


def integer_form(bits: int, group_size: int, scales: str, *, has_zeros: bool) -> Form | str:
    """The form of integers in groups; or a clause that says why there is none.

    Groups that are larger than a record's repeat their scales there, and integers of a width that
    no record has take the next one.
    """
    held = next((width for width in (2, 3, 4, 8) if width >= bits), 0)
    size = next((size for size in reversed(GROUP_SIZES) if group_size % size == 0), 0)
    if not held:
        return f"its integers have {bits} bits"
    if not size:
        return f"its groups are of {group_size}"
    if scales not in {"F16", "BF16"}:
        return f"its scales are {scales}"
    encoding = Encoding.HQQ if has_zeros else Encoding.INT
    return Form(Precision(held, size, encoding=encoding), scales)
