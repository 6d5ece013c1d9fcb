"""GGUF's types of blocks: the form in which a record keeps each, or the one that is nearest.

A block is a run of weights of one row. Types of plain integers in groups are kept: the integers as
they are, the scale of each group in 16 bits. Of Q4_0, Q8_0 and MXFP4 that is all there is, so these
are kept bit for bit. Where scale and zero are products of smaller ones (K-quants) they are rounded
to 16 bits once, which costs a thousandth of what the type itself has cost. What is left is
dequantized, by the ``gguf`` package, and quantized anew.
"""

from gguf import GGMLQuantizationType

from expertd.packing.schemes import MXFP4, PLAIN, Precision
from expertstore.pack.layout import Encoding

Type = GGMLQuantizationType

PLAIN_TYPES = {Type.F32: "F32", Type.F16: "F16", Type.BF16: "BF16"}
"""Those that are no blocks, with safetensors' names."""

KEPT = {
    Type.Q4_0: Precision(4, 32, encoding=Encoding.INT),
    Type.Q4_1: Precision(4, 32),
    Type.Q8_0: Precision(8, 32, encoding=Encoding.INT),
    Type.Q2_K: Precision(2, 16),
    Type.Q3_K: Precision(3, 16, encoding=Encoding.INT),
    Type.Q4_K: Precision(4, 32),
    Type.MXFP4: MXFP4,
}
"""How records keep types whose integers they can hold."""

EXACT = {Type.Q4_0, Type.Q8_0, Type.MXFP4}
"""Those of them that are kept bit for bit."""

_EIGHT, _FOUR = Precision(8, 128), Precision(4, 64)
NEAREST = {
    Type.Q5_0: _EIGHT,
    Type.Q5_1: _EIGHT,
    Type.Q5_K: _EIGHT,
    Type.Q6_K: _EIGHT,
    Type.IQ4_NL: Precision(4, 32),
    Type.IQ4_XS: Precision(4, 32),
    Type.IQ3_S: _FOUR,
    Type.IQ3_XXS: _FOUR,
    Type.IQ2_S: _FOUR,
    Type.IQ2_XS: _FOUR,
    Type.IQ2_XXS: _FOUR,
    Type.IQ1_M: _FOUR,
    Type.IQ1_S: _FOUR,
    Type.TQ1_0: _FOUR,
    Type.TQ2_0: _FOUR,
}
"""What types that no record keeps are quantized to."""


def precision_of(kind: Type) -> Precision:
    """What a matrix of that type becomes where the scheme keeps what it can."""
    return KEPT[kind] if kind in KEPT else NEAREST.get(kind, PLAIN)


def is_known(kind: Type) -> bool:
    """Whether weights of that type are read."""
    return kind in PLAIN_TYPES or kind in KEPT or kind in NEAREST
