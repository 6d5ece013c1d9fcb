"""Which part of a model is written with how many bits: plain data.

The paper's schemes are those of Eliseev & Mazur (arXiv 2312.17238): experts in 2 or 3 bits,
attention in 4, and embeddings, routers, norms and the output head in 16.
"""

import re
from dataclasses import dataclass, replace
from typing import Any

from expertstore.errors import ConfigError
from expertstore.pack.layout import FIXED_FORMS, ROWS_PER_BYTE, Encoding, Matrix

GROUP_SIZES = (16, 32, 64, 128)
META_GROUP_SIZE = 128


@dataclass(frozen=True)
class Precision:
    """How a kind of matrix is written; ``bits`` 0 is the checkpoint's own 16-bit type."""

    bits: int = 0
    group_size: int = 0
    meta_group_size: int = 0
    """Group of the 8-bit scales and zeros; 0: these are fp16."""
    encoding: Encoding = Encoding.HQQ
    """Of what has bits."""
    group_rows: int = 1
    """FP8: rows of a block that share a scale."""
    is_kept: bool = False
    """Whether each matrix stays as the checkpoint has it: nothing else is given then."""

    def __str__(self) -> str:
        if self.is_kept:
            return "as-is"
        if not self.bits:
            return "16"
        if self.encoding not in {Encoding.HQQ, Encoding.INT}:
            return self.encoding.value
        return f"{self.bits}g{self.group_size}" + ("m" if self.meta_group_size else "")

    def matrix(self, name: str, out_features: int, in_features: int) -> Matrix:
        """The manifest's description of a matrix written so.

        Scales and zeros stay fp16 where the meta group does not divide their number.
        """
        if not self.bits:
            return Matrix(
                name=name,
                encoding=Encoding.PLAIN,
                out_features=out_features,
                in_features=in_features,
            )
        meta_group_size = self.meta_group_size
        if meta_group_size and out_features * in_features // self.group_size % meta_group_size:
            meta_group_size = 0
        return Matrix(
            name=name,
            encoding=self.encoding,
            out_features=out_features,
            in_features=in_features,
            bits=self.bits,
            group_size=self.group_size,
            meta_group_size=meta_group_size,
            group_rows=self.group_rows,
        )


PLAIN = Precision()
MXFP4 = Precision(*FIXED_FORMS[Encoding.MXFP4], encoding=Encoding.MXFP4)
NVFP4 = Precision(*FIXED_FORMS[Encoding.NVFP4], encoding=Encoding.NVFP4)
MXFP8 = Precision(*FIXED_FORMS[Encoding.MXFP8], encoding=Encoding.MXFP8)
"""Nothing is made one of these that does not come so."""
AS_IS = Precision(is_kept=True)


@dataclass(frozen=True)
class Scheme:
    """The precision of each kind of linear layer; embeddings, norms, routers stay plain."""

    name: str
    experts: Precision
    attention: Precision
    dense: Precision = PLAIN
    """Feed-forwards that every token passes: dense layers and shared experts."""
    head: Precision = PLAIN
    """The output head, where it is not tied to the embeddings."""
    vision: Precision = PLAIN
    """The linear layers of the vision part, where there is one."""


PARTS = ("experts", "attention", "dense", "head", "vision")
"""The parts of a model that have a precision of their own: fields of :class:`Scheme`."""


SCHEMES = {
    scheme.name: scheme
    for scheme in (
        Scheme("bf16", PLAIN, PLAIN),
        Scheme("8bit", Precision(8, 128), Precision(8, 128), dense=Precision(8, 128)),
        Scheme("4bit", Precision(4, 64), Precision(4, 64), dense=Precision(4, 64)),
        # What a token reads of a bf16 head can be a third of all. 8 bits, since the head's errors
        # are the logits'.
        Scheme(
            "4bit-fast",
            Precision(4, 64),
            Precision(4, 64),
            dense=Precision(4, 64),
            head=Precision(8, 128),
        ),
        Scheme("as-is", AS_IS, AS_IS, dense=AS_IS, head=AS_IS),
        Scheme(
            "paper-3bit",
            Precision(3, 64, META_GROUP_SIZE),
            Precision(4, 64, META_GROUP_SIZE),
        ),
        Scheme(
            "paper-2bit",
            Precision(2, 16, META_GROUP_SIZE),
            Precision(4, 64, META_GROUP_SIZE),
        ),
    )
}


def parse_precision(text: str) -> Precision:
    """``16``, ``as-is``, or bits and group size as in ``4g64``, with ``m`` for 8-bit scales.

    Raises :class:`ConfigError`.
    """
    if text in {"16", str(AS_IS)}:
        return AS_IS if text == str(AS_IS) else PLAIN
    match = re.fullmatch(r"(\d+)g(\d+)(m?)", text)
    if match is None or int(match[1]) not in ROWS_PER_BYTE or int(match[2]) not in GROUP_SIZES:
        raise ConfigError(
            f"{text!r} is not a precision: give 16, as-is, or one of {sorted(ROWS_PER_BYTE)} bits "
            f"with a group size of {GROUP_SIZES}, such as 4g64, or 2g16m for 8-bit scales."
        )
    return Precision(int(match[1]), int(match[2]), META_GROUP_SIZE if match[3] else 0)


def choose_scheme(
    name: str,
    experts: str | None = None,
    attention: str | None = None,
    dense: str | None = None,
    head: str | None = None,
    vision: str | None = None,
) -> Scheme:
    """The preset ``name``, with the precision of a part replaced where one is given.

    Raises :class:`ConfigError`.
    """
    if name not in SCHEMES:
        raise ConfigError(f"There is no scheme {name!r}; there are {', '.join(SCHEMES)}.")
    scheme = SCHEMES[name]
    for part, text in zip(PARTS, (experts, attention, dense, head, vision), strict=True):
        if text is not None:
            precision = parse_precision(text)
            changes: dict[str, Any] = {part: precision, "name": f"{scheme.name} {part}={precision}"}
            scheme = replace(scheme, **changes)
    return scheme
