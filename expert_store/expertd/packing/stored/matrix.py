"""One matrix of a checkpoint in the values of a record, whose rows can still be moved."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor

from expertd.packing.schemes import Precision
from expertstore.pack.codec import E8M0_NAN, dequantize, encode
from expertstore.pack.layout import ROWS_PER_BYTE, Encoding, Matrix


@dataclass(frozen=True)
class StoredMatrix:
    """A matrix [out, in] as it is stored.

    ``values`` are the parts of a record by the ends of their names (``q``, ``scale``, ``zero``,
    ``global``), all with ``out`` rows, but FP8's scales with one for each block of rows; ``q``
    [out, in] is uint8 and not yet packed to bytes.
    """

    precision: Precision
    values: Mapping[str, Tensor]

    @property
    def is_finite(self) -> bool:
        """Whether all scales are numbers, and all values that are no integers."""
        encoding, scale = self.precision.encoding, self.values["scale"]
        if encoding in {Encoding.FP8, Encoding.MXFP8} and _has_nan(self.values["q"]):
            return False
        if encoding in {Encoding.MXFP4, Encoding.MXFP8}:
            return not bool((scale == E8M0_NAN).any())
        if encoding is Encoding.NVFP4:
            return not _has_nan(scale) and bool(torch.isfinite(self.values["global"]).all())
        return bool(torch.isfinite(scale).all())

    def in_blocks_of(self, rows: int) -> Self:
        """FP8 with blocks of ``rows`` rows, a divisor of those that it has and of all rows."""
        repeats = self.precision.group_rows // rows
        if repeats == 1:
            return self
        scale = self.values["scale"].repeat_interleave(repeats, dim=0)
        scale = scale[: self.values["q"].shape[0] // rows]
        precision = replace(self.precision, group_rows=rows)
        return type(self)(precision, {**self.values, "scale": scale})

    def reordered(self, order: Callable[[Tensor], Tensor]) -> Self:
        """With its rows as ``order`` has those of a tensor."""
        values = {name: order(part) for name, part in self.values.items()}
        return type(self)(self.precision, values)

    @classmethod
    def stacked(cls, matrices: Sequence[Self]) -> Self:
        """Matrices of one form, one below the other."""
        names = matrices[0].values
        values = {name: torch.cat([each.values[name] for each in matrices]) for name in names}
        return cls(matrices[0].precision, values)

    def matrix(self, name: str) -> Matrix:
        """Its description in a manifest."""
        return self.precision.matrix(name, *self.values["q"].shape)

    def parts(self, name: str) -> dict[str, Tensor]:
        """The parts of a matrix ``name`` of a record. Raises ValueError if rows cannot share bytes.

        Of 4 bits, for example, an odd number of them cannot.
        """
        packed = {"q": encode(self.values["q"], self.precision.bits)}
        return {f"{name}.{end}": part for end, part in {**self.values, **packed}.items()}

    def dequantize(self, dtype: torch.dtype) -> Tensor:
        """The weights [out, in] in ``dtype``, computed in float32 and rounded once."""
        rows = self.values["q"].shape[0]
        padded = self
        if padding := -rows % ROWS_PER_BYTE[self.precision.bits]:
            padded = self.reordered(
                lambda part: torch.cat((part, part[:1].expand(padding, *part.shape[1:])))
            )
        matrix = padded.matrix("weight")
        return dequantize(matrix, padded.parts("weight"), dtype)[:rows]


def _has_nan(codes: Tensor) -> bool:
    """Whether one of the bytes is no number as e4m3."""
    return bool((codes & 127 == 127).any())
