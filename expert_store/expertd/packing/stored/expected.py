"""The form in which a configuration says that a matrix is stored, before there are tensors."""

from expertd.packing.schemes import MXFP4
from expertd.packing.stored.description import Description
from expertd.packing.stored.weight import Form


def expected_form(description: Description, module: str) -> Form | None:
    """Of the weight of ``module``, such as ``model.layers.0.mlp.experts.gate_up_proj``.

    None if it is in 16 bits, or in a form that no record has.
    """
    if description.method == "mxfp4":
        return Form(MXFP4) if ".experts." in module else None
    return None
