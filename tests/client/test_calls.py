"""What the daemon says of a layout is what the client understands."""

import pytest

from expertd.serving import messages
from expertd_client import calls
from expertstore.pack.layout import Encoding, Matrix, record_layout


@pytest.mark.parametrize("encoding", list(Encoding))
def test_layouts_survive_the_wire(encoding: Encoding) -> None:
    matrix = Matrix(name="down", encoding=encoding, out_features=64, in_features=128)
    if encoding is not Encoding.PLAIN:
        matrix = Matrix(
            name="down",
            encoding=encoding,
            out_features=64,
            in_features=128,
            bits=4,
            group_size=32,
        )
    layout = record_layout((matrix,), "BF16", has_bias=True)
    assert calls._layout(messages._layout(layout)) == layout
