"""Many prompts of a file: what a line says, what is refused, and what becomes of each."""

import io
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from expertd_inference.cli.many import PromptResult, Totals, continue_all
from expertd_inference.cli.prompt_file import PromptLine, read_prompt_file
from expertd_inference.engine.budget import EngineLimits
from expertd_inference.engine.engine import Engine
from expertd_inference.grammar import grammar_of_regex
from expertd_inference.settings import GenerationSettings
from expertstore.errors import InvalidInputError, RecordLostError, UnavailableError
from tests.inference.engine.toy import ToyWorker

DEFAULTS = GenerationSettings(max_new_tokens=5, temperature=0.5, seed=7)


def read(tmp_path: Path, text: str) -> list[PromptLine]:
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    return read_prompt_file(path, DEFAULTS)


def test_what_a_line_says(tmp_path: Path) -> None:
    first, second, third = read(
        tmp_path,
        '{"prompt": "Once"}\n'
        "\n"
        '{"messages": [{"role": "user", "content": "Hi"}], "stop": ["x"], "seed": 1}\n'
        '{"tokens": [1, 2], "logit_bias": {"3": 1.5}, "max_new_tokens": 9, '
        '"grammar": {"kind": "regex", "text": "[0-9]+"}}',
    )
    assert (first.number, first.prompt, first.settings) == (1, "Once", DEFAULTS)
    assert second.number == 3
    assert second.prompt == [{"role": "user", "content": "Hi"}]
    assert (second.settings.stop, second.settings.seed) == (("x",), 1)
    assert (second.settings.temperature, second.settings.max_new_tokens) == (0.5, 5)
    assert third.prompt == [1, 2]
    assert third.settings.logit_bias == {3: 1.5}
    assert third.settings.max_new_tokens == 9
    assert third.settings.grammar == grammar_of_regex("[0-9]+")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "Input data was truncated; give one JSON object a line."),
        ('{"prompt": "a", "temperature": NaN}', "invalid character (byte 31); give one JSON"),
        ("[]", "Expected `object`, got `array`"),
        ("{}", "it has no prompt; give one of prompt, messages, tokens"),
        ('{"prompt": "a", "tokens": [1]}', "it has prompt and tokens; give one"),
        ('{"prompt": 3}', "Expected `str | null`, got `int`"),
        ('{"prompt": "a", "temprature": 1}', "unknown field `temprature`"),
        ('{"prompt": "a", "temperature": -1}', "temperature is -1.0; give 0 to 100"),
        ('{"prompt": "a", "stop": [""]}', "stop has an empty text"),
        ('{"prompt": "\\udce9"}', ""),
        ('{"messages": [{"role": "user"}]}', "missing required field `content`"),
    ],
)
def test_a_wrong_line_is_named(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(InvalidInputError) as raised:
        read(tmp_path, '{"prompt": "fine"}\n' + line + "\n")
    said = str(raised.value)
    assert said.startswith(f"{tmp_path}/prompts.jsonl, line 2: ")
    assert message in said
    assert "\n" not in said


def test_files_that_are_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InvalidInputError, match="has no prompt; give one JSON object a line"):
        read(tmp_path, "\n \n")
    with pytest.raises(InvalidInputError, match="cannot be read: Is a directory"):
        read_prompt_file(tmp_path, DEFAULTS)
    for line in (b"\xff", b'{"prompt": "caf\xe9"}'):
        stdin = SimpleNamespace(buffer=io.BytesIO(b'{"prompt": "a"}\n' + line + b"\n"))
        monkeypatch.setattr("sys.stdin", stdin)
        with pytest.raises(InvalidInputError, match="stdin, line 2: "):
            read_prompt_file(Path("-"), DEFAULTS)


def test_files_of_other_systems(tmp_path: Path) -> None:
    one, two = read(tmp_path, '\ufeff{"prompt": "a"}\r\n{"prompt": "b"}\r\n')
    assert [one.prompt, two.prompt] == ["a", "b"]


@pytest.fixture
def worker() -> ToyWorker:
    return ToyWorker()


@pytest.fixture
def engine(worker: ToyWorker) -> Iterator[Engine]:
    with Engine(worker, EngineLimits(max_sequences=3, kv_tokens=512)) as engine:
        yield engine


def lines(*prompts: Any, **settings: Any) -> list[PromptLine]:
    return [
        PromptLine(number, prompt, GenerationSettings(ignore_eos=True, **settings))
        for number, prompt in enumerate(prompts, start=1)
    ]


def test_each_line_is_answered(engine: Engine, worker: ToyWorker) -> None:
    results: list[PromptResult] = []
    continue_all(engine, lines(*"abcdefgh", max_new_tokens=4, logprobs=1), results.append)
    assert sorted(result.line for result in results) == list(range(1, 9))
    for result in results:
        tokens = list(
            engine.submit("abcdefgh"[result.line - 1], lines("", max_new_tokens=4)[0].settings)
        )
        assert result.tokens == [token.id for token in tokens]
        assert result.text == "".join(token.text for token in tokens)
        assert (result.prompt_tokens, result.new_tokens) == (1, 4)
        assert result.finish_reason == "length"
        assert result.logprobs is not None
        assert result.top_logprobs is not None
        assert [likely[0][1] for likely in result.top_logprobs] == result.logprobs, "greedy"
        assert result.error is None
    assert max(worker.executor.num_rows) == 3, "computed together"


def test_no_line_fails_since_others_wait(worker: ToyWorker) -> None:
    results: list[PromptResult] = []
    with Engine(worker, EngineLimits(max_sequences=3, max_waiting=2, kv_tokens=512)) as engine:
        continue_all(engine, lines(*"abcdefgh", max_new_tokens=4), results.append)
    assert [result.error for result in results] == [None] * 8


def test_a_line_that_fails_does_not_end_the_others(engine: Engine, worker: ToyWorker) -> None:
    results: list[PromptResult] = []
    totals = Totals()
    continue_all(engine, lines("a", [1] * 512, [9999], "b", max_new_tokens=4), results.append)
    by_line = {result.line: result for result in results}
    for result in results:
        totals.count(result)
    totals.end(2.0, engine.stats)
    assert "leaves no room" in str(by_line[2].error)
    assert "token 9999" in str(by_line[3].error)
    assert [by_line[line].new_tokens for line in (1, 4)] == [4, 4]
    assert (totals.num_prompts, totals.num_failed, totals.new_tokens) == (4, 2, 8)
    assert totals.tokens_per_second == 4.0
    worker.executor.faults = [RecordLostError("Expert 3 is lost.", experts=[(0, 3)])]
    results.clear()
    continue_all(engine, lines("a", max_new_tokens=4), results.append)
    assert [result.error for result in results] == ["Expert 3 is lost."]


def test_what_would_end_all_ends_all(engine: Engine, worker: ToyWorker) -> None:
    worker.executor.faults = [UnavailableError("The daemon is gone.")] * 100
    results: list[PromptResult] = []
    with pytest.raises(UnavailableError):
        continue_all(engine, lines(*"abcdefghijkl", max_new_tokens=4), results.append)
    assert not results
