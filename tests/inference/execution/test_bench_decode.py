"""The benchmark of decoding runs, in its quickest form; what it measures is not judged here."""

import json
from pathlib import Path

import pytest

from bench import decode


def test_it_measures_ours(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--quick", "--json", "--shape", "qwen3-30b-a3b", "--layers", "2", "--threads", "1"]
    arguments += ["--rounds", "1", "--tokens", "3", "--prompt-tokens", "8", "--dir", str(tmp_path)]
    decode.main(arguments)
    figures = json.loads(capsys.readouterr().out)["figures"]
    assert {"decode", "prompt"} <= {figure["part"] for figure in figures}
    assert all(figure["ours"] > 0 for figure in figures)
    assert not list(tmp_path.iterdir())


def test_a_peer_that_is_not_installed(tmp_path: Path) -> None:
    options = ["--quick", "--shape", "olmoe-1b-7b", "--llama-python", "/bin/false"]
    with pytest.raises(SystemExit, match="needs llama-cpp-python"):
        decode.main([*options, "--dir", str(tmp_path), "--threads", "1"])


class Fake:
    """A contestant that takes as long as it is told."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.closed = 0

    def decode(self, tokens: int) -> float:
        return self.seconds * tokens

    def prompt(self, tokens: int) -> float:
        return self.seconds * tokens / 10

    def close(self) -> None:
        self.closed += 1


def test_turns_leave_out_the_first_round() -> None:
    turns = decode.Turns(rounds=2, tokens=4, prompt_tokens=5)
    turns.run({decode.OURS: Fake(0.1), decode.PRIVATE: Fake(0.2)}, lambda _: None)
    assert turns.decode == {
        decode.OURS: pytest.approx([10, 10]),
        decode.PRIVATE: pytest.approx([5, 5]),
    }
    assert turns.prompt[decode.OURS] == pytest.approx([100, 100])


def test_three_copies_must_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer of OLMoE's experts is 216 MiB of 4.5 bits a weight."""
    for copies, fit in ((2.9, False), (3.1, True)):
        free = int(copies * (216 << 20)) + decode._RESERVE_BYTES
        monkeypatch.setattr(decode, "memory_available", lambda free=free: free)
        assert decode._fits("olmoe-1b-7b", 1) == fit
