"""Which experts of a model are used most, by a trace."""

from pathlib import Path

import pytest

from expertd.traces.usage import PruneBy, Usage, read_usage
from expertstore.errors import TraceError

HEAD = "# layers: 2\n# layer_ids: 1 3\n# experts_per_layer: 4\n# experts_per_token: 2\n"
COUNTED = HEAD + "phase,step,layer,experts\ndecode,0,1,3 1\ndecode,0,3,0 1\ndecode,1,1,3 2\n"
WEIGHTED = (
    HEAD + "phase,step,layer,experts,weights\n"
    "prefill,0,1,3 1,0.5 2\nprefill,0,3,0 1,1 1\nprefill,1,1,3 2,0.25 0.5\n"
)


def write(path: Path, text: str) -> Path:
    (path / "t.csv").write_text(text)
    return path / "t.csv"


@pytest.mark.parametrize(
    ("text", "by", "scores"),
    [
        (COUNTED, None, (0, 1, 1, 2)),
        (WEIGHTED, PruneBy.COUNTS, (0, 1, 1, 2)),
        (WEIGHTED, None, (0, 2, 0.5, 0.75)),
        (WEIGHTED, PruneBy.ACTIVATION, (0, 2, 0.5, 0.75)),
    ],
)
def test_scores(tmp_path: Path, text: str, by: PruneBy | None, scores: tuple[float, ...]) -> None:
    usage = read_usage(write(tmp_path, text), by)
    assert usage.layer_ids == (1, 3)
    assert usage.scores == (scores, (1, 1, 0, 0))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (COUNTED, "does not say how much experts added"),
        (WEIGHTED.replace("prefill,0,3,0 1,1 1\n", ""), "has nothing of layer 3"),
    ],
)
def test_a_trace_that_says_too_little(tmp_path: Path, text: str, said: str) -> None:
    with pytest.raises(TraceError, match=said):
        read_usage(write(tmp_path, text), PruneBy.ACTIVATION)


def test_as_many_of_each_group() -> None:
    usage = Usage((5,), ((9, 8, 7, 1, 1, 2),))
    assert usage.most_used(5, 2) == [0, 1]
    assert usage.most_used(5, 2, num_groups=2) == [0, 5]
    assert usage.most_used(5, 4, num_groups=2) == [0, 1, 3, 5], "of equal ones the first"
