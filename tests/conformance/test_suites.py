"""How suites' own results are read; the suites themselves need the network."""

from pathlib import Path
from typing import Any

import pytest

from tests.conformance.__main__ import SUITES, main
from tests.conformance.cases import Case, Outcome, Report
from tests.conformance.llama_cpp import groups_of, not_run
from tests.conformance.lm_eval_suite import compared as compared_perplexities
from tests.conformance.lm_eval_suite import rolling
from tests.conformance.load_generator import Load, compared, read_aiperf, read_metrics
from tests.conformance.outside import Outside, SuiteError

METRICS = """\
# TYPE vllm:request_success_total counter
vllm:request_success_total{{finished_reason="length",model_name="m"}} {num}
vllm:request_success_total{{finished_reason="stop",model_name="m"}} 1
# TYPE vllm:prompt_tokens_total counter
vllm:prompt_tokens_total{{model_name="m"}} {tokens}
# TYPE vllm:generation_tokens_total counter
vllm:generation_tokens_total{{model_name="m"}} {tokens}
# TYPE vllm:time_to_first_token_seconds summary
vllm:time_to_first_token_seconds_count{{model_name="m"}} {num}
vllm:time_to_first_token_seconds_sum{{model_name="m"}} {seconds}
# TYPE vllm:time_per_output_token_seconds summary
vllm:time_per_output_token_seconds_count{{model_name="m"}} {num}
vllm:time_per_output_token_seconds_sum{{model_name="m"}} {seconds}
"""


def test_windows_are_lm_eval_s() -> None:
    # What lm-eval 0.4.13's get_rolling_token_windows and make_disjoint_window give.
    assert [*rolling([1, 2, 3, 4, 5], 0, 2)] == [
        ([0, 1], [1, 2]),
        ([2, 3], [3, 4]),
        ([3, 4], [5]),
    ]
    assert [*rolling([1, 2], 0, 4)] == [([0, 1], [1, 2])]


def test_perplexities_are_the_same_or_a_failure() -> None:
    assert compared_perplexities("x", 6.7700, 6.7701).outcome is Outcome.PASSED
    for by_server in (6.70, 6.84):
        case = compared_perplexities("x", by_server, 6.77)
        assert case.outcome is Outcome.FAILED
        assert "6.77000 by a worker" in case.reason


def test_loads_are_read_from_both_sides() -> None:
    before = METRICS.format(num=2, tokens=10, seconds=1.0)
    after = METRICS.format(num=6, tokens=50, seconds=3.0)
    assert read_metrics(before, after) == Load(4, 40, 40, 0.5, 0.5)
    averages: dict[str, float] = {
        "completed_request_count": 4,
        "total_usage_prompt_tokens": 40,
        "total_usage_completion_tokens": 40,
        "time_to_first_token": 510.0,
        "inter_token_latency": 490.0,
    }
    found: dict[str, Any] = {name: {"avg": value} for name, value in averages.items()}
    assert read_aiperf(found) == Load(4, 40, 40, 0.51, 0.49)


def test_counts_are_equal_and_times_are_near() -> None:
    server = Load(4, 40, 40, 0.5, 0.010)
    good = [*compared("x", Load(4, 40, 40, 0.6, 0.012), server)]
    assert {case.outcome for case in good} == {Outcome.PASSED}
    bad = compared("x", Load(4, 40, 39, 0.7, 0.07), server)
    assert [case.name for case in bad if case.outcome is Outcome.FAILED] == [
        "x: num_new_tokens",
        "x: first_seconds",
        "x: token_seconds",
    ]


def test_llama_s_cases_are_sorted() -> None:
    ids = [
        "unit/test_embedding.py::test_a",
        "unit/test_basic.py::test_b",
        "unit/test_basic.py::test_real_model[tool-a/Hermes-3-8B-chatml-x]",
        "unit/test_tool_call.py::test_weather[a/Hermes-3-8B-None]",
        "unit/test_security.py::test_c",
        "unit/test_template.py::test_d[some-template-on]",
    ]
    left = [*not_run(ids)]
    assert [(case.file, case.name) for case in left] == [
        ("unit.test_embedding", "test_a"),
        ("unit.test_tool_call", "test_weather[a/Hermes-3-8B-None]"),
    ]
    templates = [Path("some-template.jinja"), Path("some.jinja"), Path("chatml.jinja")]
    groups = groups_of([ids[1], ids[2], *ids[4:]], templates, Path("keys"))
    assert {name: group.cases for name, group in groups.items()} == {
        "the example model": [ids[1]],
        "template chatml": [ids[2]],
        "with a key": [ids[4]],
        "template some-template": [ids[5]],
    }
    assert groups["template some-template"].template == Path("some-template.jinja")
    assert groups["with a key"].arguments[:3] == ("--keys", Path("keys"), "--cors-origin")


def test_suites_are_chosen_and_one_that_breaks_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def good(_: Outside, sdist: Path | None) -> Report:
        assert sdist is None
        return Report("good", "1", [Case("f", "n", Outcome.PASSED)])

    def broken(_: Outside, __: Path | None) -> Report:
        raise SuiteError("pip ended with 1")

    monkeypatch.setitem(SUITES, "openai", good)
    monkeypatch.setitem(SUITES, "load", broken)
    assert main(["--only", "openai"]) == 0
    assert "| good 1 | 1 | 0 | 0 |" in capsys.readouterr().out
    assert main(["--only", "openai", "--only", "load", "--json"]) == 1
    printed = capsys.readouterr()
    assert '"suite": "good"' in printed.out
    assert printed.err == "load: pip ended with 1\n"


def test_a_failed_case_is_named_and_ends_with_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case = Case("f", "n", Outcome.FAILED, "it broke")
    monkeypatch.setitem(SUITES, "load", lambda *_: Report("bad", "1", [case]))
    assert main(["--only", "load"]) == 1
    assert capsys.readouterr().err == "failed: bad: f n: it broke\n"
