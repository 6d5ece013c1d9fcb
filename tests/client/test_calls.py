"""What the daemon says of a layout is what the client understands."""

import pytest

from expertd.serving import messages
from expertd_client import calls
from expertd_testing.forms import form
from expertstore.errors import PreconditionError
from expertstore.pack.layout import Encoding, record_layout


@pytest.mark.parametrize("encoding", list(Encoding))
def test_layouts_survive_the_wire(encoding: Encoding) -> None:
    matrix = form(encoding, 64, 128, group_rows=16)
    layout = record_layout((matrix,), "BF16", has_bias=True)
    assert calls._layout(messages._layout(layout)) == layout


def test_a_form_of_a_newer_daemon_is_refused_in_a_sentence() -> None:
    layout = messages._layout(record_layout((form(Encoding.FP8, 64, 128),), "BF16", has_bias=False))
    layout.matrices[0].encoding = 99  # type: ignore[assignment]
    with pytest.raises(PreconditionError, match=r"^The daemon's down is .* \(number 99\); use a "):
        calls._layout(layout)
