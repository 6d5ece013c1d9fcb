"""What 8-bit activations cost: every way is the model's own, and the table says what was found."""

from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest

from bench import activations
from bench.heldout import Heldout, read_heldout


def test_the_ways_differ_and_are_near_one_another() -> None:
    heldout = read_heldout(64, 2)
    torchs, two, one = activations.measure("4g64m", heldout)
    for nats in (torchs, two, one):
        assert nats.shape == (2,)
        # It was trained on such text: far better than a guess among thousands of tokens.
        assert heldout.perplexity(nats) < 200
    np.testing.assert_allclose(two, torchs, rtol=0.02)
    np.testing.assert_allclose(one, two, rtol=0.05)
    assert (torchs != two).any()
    assert (one != two).any()


def test_the_table(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    windows = [SimpleNamespace(targets=range(50))] * 2
    monkeypatch.setattr(
        activations, "read_heldout", lambda _, most: Heldout(windows[:most], 100, 100)
    )

    def measure(precision: str, _: Heldout) -> Iterator[np.ndarray]:
        per_token = {"8g128": (2.0, 2.01, 2.03), "2g16m": (3.0, 3.0, 3.0)}[precision]
        return (np.full(2, 50 * each) for each in per_token)

    monkeypatch.setattr(activations, "measure", measure)
    monkeypatch.setenv("COLUMNS", "200")
    activations.main(["--precision", "8g128", "--precision", "2g16m", "--windows", "2"])
    title, *lines = capsys.readouterr().out.splitlines()
    assert "100 tokens in 2 windows" in title
    first, second = (next(line for line in lines if name in line) for name in ("8g128", "2g16m"))
    cells = [cell.strip() for cell in first.strip("│ ").split("│")]
    assert cells[1:4] == [f"{np.exp(nats):.4f}" for nats in (2.0, 2.01, 2.03)]
    assert cells[4] == "+1.005% (+1.005% to +1.005%)"
    assert cells[5] == "+2.020% (+2.020% to +2.020%)"
    assert second.count("+0.000% (+0.000% to +0.000%)") == 2
