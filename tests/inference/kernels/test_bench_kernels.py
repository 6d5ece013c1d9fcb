"""The benchmarks of kernels and of attention run; what they measure is not judged here."""

import json

import pytest

from bench import attention, kernels
from expertd_inference.kernels.cpu.library import native_library


@pytest.mark.skipif(native_library().library is None, reason="no native kernels")
def test_the_kernels_are_measured(capsys: pytest.CaptureFixture[str]) -> None:
    what = "--part experts --shape qwen3-30b-a3b --precision 2g16m"
    kernels.main(f"--json {what} --bytes 50000000 --rounds 2".split())
    (figure,) = json.loads(capsys.readouterr().out)["figures"]
    assert figure["ours"] > 0
    assert figure["goal"] == "ratio >= 0.7"


@pytest.mark.skipif(native_library().library is None, reason="no native kernels")
def test_attention_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    attention.main(
        [
            "--json",
            "--shape",
            "32 over 4",
            *["--sequences", "2", "--length", "70", "--bytes", "1", "--rounds", "2"],
        ]
    )
    decoding, prompt = json.loads(capsys.readouterr().out)["figures"]
    assert decoding["ours"] > 0 < prompt["ours"]
    assert (decoding["part"], prompt["part"]) == ("decode", "prompt")
