"""``make gpu-bench`` runs from end to end on the fake device; what it measures is not judged."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench import gpu_needs
from bench.gpu_routing import routing_for

ROOT = Path(__file__).parent.parent


@pytest.mark.bench
def test_the_bench_runs_on_the_fake_device(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "bench.gpu", "--fake", "--out", str(tmp_path), "--json"]
    done = subprocess.run(
        [*command, "--shape", "qwen3-30b-a3b"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads(done.stdout)
    assert content["failures"] == []
    assert "failed" not in done.stderr
    whats = " ".join(figure["what"] for figure in content["figures"])
    for way in ("full", "no speculation", "no cache", "naive", "segments", "whole", "CPU share"):
        assert f"{way}, " in whats
    assert json.loads((tmp_path / "gpu-fake.json").read_text()) == content
    page = (tmp_path / "gpu-fake.md").read_text()
    assert page.count("| qwen3-30b-a3b") == len(content["figures"])


def test_what_is_missing_is_said(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert gpu_needs.missing() == []
    monkeypatch.setitem(gpu_needs.NEEDED, "no_such_module.inside", "no-such-thing")
    with pytest.raises(SystemExit):
        gpu_needs.main()
    assert "lacks no-such-thing: install" in capsys.readouterr().err


def test_routing_is_replayed_and_filled_up(tmp_path: Path) -> None:
    trace = tmp_path / "some-model.csv"
    trace.write_text(
        "# layers: 2\n# experts_per_layer: 8\n# experts_per_token: 2\nphase,step,layer,experts\n"
        "prefill,0,0,1 2\ndecode,1,0,3 4\ndecode,1,1,5 6\ndecode,2,0,7 0\ndecode,2,1,1 2\n"
    )
    routing = routing_for("some-model", 2, 8, 3, 3, [trace])
    assert routing.experts.shape == (3, 2, 3)
    first = [[3, 4], [5, 6]]
    assert routing.experts[:, :, :2].tolist() == [first, [[7, 0], [1, 2]], first]
    assert "1 of 3 drawn" in routing.what
    assert all(len(set(row)) == 3 for token in routing.experts.tolist() for row in token)
    drawn = routing_for("other", 2, 8, 3, 5, [trace])
    assert "Zipf" in drawn.what
    assert drawn.experts.max() < 8
