"""What an engine's process says of sequences that it does not begin."""

from types import SimpleNamespace
from typing import Any

import pytest

from expertd_inference.server.hosting.engine_child import Outbox
from expertd_inference.server.hosting.messages import Progress
from expertstore.errors import PreconditionError


@pytest.mark.parametrize("closed", [False, True])
def test_a_sequence_is_refused_by_an_engine_that_computes_others(*, closed: bool) -> None:
    said: list[Progress] = []
    link: Any = SimpleNamespace(send=said.append)
    outbox = Outbox(link)
    engine: Any = SimpleNamespace(closed=closed)
    outbox.engine = engine
    outbox.refuse(7, PreconditionError("It is not installed."))
    ((id_, failure),) = said[0].ended
    assert failure is not None
    assert (id_, failure.kind, failure.refuses) == (7, "PreconditionError", not closed)
    assert str(failure.error()) == "It is not installed."
