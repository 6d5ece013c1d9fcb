"""The benchmark of the GPU's kernels runs to its end, interpreted where no GPU is."""

import json

import pytest

pytest.importorskip("triton")

from bench import gpu_kernels


@pytest.mark.parametrize("mode", [[], ["--tune"]])
def test_quick(mode: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    gpu_kernels.main(["--quick", "--json", *mode])
    report = json.loads(capsys.readouterr().out)
    parts = {figure["part"] for figure in report["figures"]}
    assert parts == ({"tune"} if mode else {"gemv", "gemm", "linear"})
    assert all(figure["ours"] > 0 for figure in report["figures"])
