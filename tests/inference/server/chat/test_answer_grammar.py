"""Answers that a grammar forces, in every family's format, from tokens at random."""

import json
from collections.abc import Iterator, Sequence
from random import Random
from types import SimpleNamespace
from typing import Any, cast

import pytest

from expertd_inference.engine.matcher import Grammars
from expertd_inference.grammar import (
    GrammarSpec,
    grammar_of_choice,
    grammar_of_json_schema,
    grammar_of_regex,
    grammar_of_text,
)
from expertd_inference.server.chat.answer import AnswerParser, ToolCall
from expertd_inference.server.chat.answer_grammar import AnswerGrammar, Reasoning
from expertd_inference.server.chat.families import family_named
from expertd_inference.server.chat.forced_calls import FORCED, rules_of_tools
from expertd_inference.server.chat.regions import Kind
from expertd_inference.server.hosting.model_text import ModelText
from expertd_testing.recital import END, make_tokenizer
from expertstore.errors import InvalidInputError
from tests.inference.server.chat.recorded import RECORDED
from tests.inference.server.chat.recorded import TOOLS as RECORDED_TOOLS

# Of some families the markers are tokens, of others texts.
SPECIAL = (
    *("<|channel|>", "<|message|>", "<|start|>", "<|end|>", "<|call|>", "<|constrain|>"),
    *("<|tool_call>", "<tool_call|>", "[TOOL_CALLS]", "[THINK]", "[/THINK]"),
    *("<｜tool▁calls▁begin｜>", "<｜tool▁call▁begin｜>", "<｜tool▁sep｜>", "<｜tool▁call▁end｜>"),
    *("<｜tool▁calls▁end｜>", "｜DSML｜", "</think>"),
)
CITY = {
    "type": "object",
    "properties": {
        "city": {"type": "string"},
        "unit": {"enum": ["C", "F"]},
        "days": {"type": "integer", "minimum": 1, "maximum": 9},
        "near": {"anyOf": [{"type": "boolean"}, {"type": "null"}]},
    },
    "required": ["city", "days", "near"],
}
CODE = {
    "type": "object",
    "properties": {"code": {"type": "string", "pattern": "^[A-Z]{3}$"}},
    "required": ["code"],
}


def tool(name: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
    function = {"name": name} if parameters is None else {"name": name, "parameters": parameters}
    return {"type": "function", "function": function}


PLAIN = [tool("look", CITY), tool("stop-now")]
PATTERNED = [*PLAIN, tool("code", CODE)]
TOOLS = {"plain": PLAIN, "patterned": PATTERNED}
MAX_TOKENS = 3000
ENDINGS = {
    "deepseek-v3.2": "</｜DSML｜parameter>\n",
    "glm": "</arg_value>\n",
    "minimax": "</parameter>\n",
    "qwen-coder": "\n</parameter>\n",
}
"""Of texts that are arguments."""


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> ModelText:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory, *SPECIAL)
    return ModelText("any", directory)


@pytest.fixture(scope="module")
def grammars(text: ModelText) -> Iterator[Grammars]:
    worker = SimpleNamespace(tokenizer=text.tokenizer, vocabulary=len(text.tokenizer))
    grammars = Grammars(cast("Any", worker))
    yield grammars
    grammars.close()


@pytest.fixture(scope="module")
def end(text: ModelText) -> int:
    """The token that ends a text."""
    (found,) = text.encode(END, special=False)
    return found


def special(text: ModelText) -> dict[str, int]:
    return {one: id_ for id_, one in text.special_tokens.items()}


def written(
    grammars: Grammars, text: ModelText, spec: GrammarSpec, seed: int, ending: str = ""
) -> str:
    """A text that the grammar allows, which closes sooner than tokens at random would.

    Any text in it may have ``ending`` behind it.
    """
    random = Random(seed)
    (end,) = text.encode(END, special=False)
    closing = {*text.encode('"}]<yn;\n', special=False), end}
    closing |= {id_ for one, id_ in special(text).items() if "begin" not in one}
    matcher = grammars.matcher(spec, frozenset({end}))
    tokens: list[int] = []
    wanted: list[int] = []
    while len(tokens) < MAX_TOKENS and not matcher.must_end:
        allowed = [int(one) for one in matcher.allowed().nonzero()[0]]
        if not wanted and len(allowed) > 100 and random.random() < 0.2:
            wanted = text.encode(ending, special=False)
        likely = [one for one in allowed if one in closing]
        token = random.choice(likely if likely and random.random() < 0.6 else allowed)
        if wanted and (following := wanted.pop(0)) in allowed:
            token = following
        if not matcher.take(token):
            assert matcher.error is None
            tokens += [token] if token != end else []
            break
        tokens.append(token)
        grammars.look([matcher])
    assert len(tokens) < MAX_TOKENS
    return text.decode(tokens)


def check(calls: Sequence[ToolCall]) -> None:
    assert calls
    assert len({call.id for call in calls}) == len(calls)
    for call in calls:
        arguments = json.loads(call.arguments)
        if call.name == "look":
            assert arguments.keys() - {"unit"} == {"city", "days", "near"}
            assert isinstance(arguments["city"], str)
            assert 1 <= arguments["days"] <= 9
            assert arguments.get("unit", "C") in ("C", "F")
            assert arguments["near"] in (True, False, None)
        elif call.name == "code":
            assert arguments["code"].isupper()
            assert len(arguments["code"]) == 3
        else:
            assert (call.name, arguments) == ("stop-now", {})


def in_family(family: str, text: ModelText, **more: Any) -> AnswerGrammar:
    return AnswerGrammar(family=family_named(family), special_tokens=special(text), **more)


def reasoning_of(family: str, *, has_begun: bool = False) -> Reasoning:
    regions = family_named(family).regions
    region = next(one for one in regions if one.kind is Kind.REASONING)
    return Reasoning(region=region, has_begun=has_begun)


@pytest.mark.parametrize("tools", TOOLS)
@pytest.mark.parametrize("family", sorted(FORCED))
def test_calls_that_are_required_are_read(
    family: str, tools: str, grammars: Grammars, text: ModelText
) -> None:
    rules = rules_of_tools(family, TOOLS[tools], special(text), parallel=True)
    spec = in_family(family, text).of_calls(rules)
    spec.check()
    numbers = set()
    for seed in range(16):
        said = written(grammars, text, spec, seed, ENDINGS.get(family, ""))
        piece = AnswerParser(family_named(family), "", TOOLS[tools]).finish(said)
        check(piece.calls)
        assert (piece.content, piece.reasoning) == ("", ""), said
        numbers.add(len(piece.calls))
    assert max(numbers) > 1 or family == "gpt-oss"


@pytest.mark.parametrize("family", sorted(FORCED))
def test_one_call_where_several_are_not_wanted(
    family: str, grammars: Grammars, text: ModelText
) -> None:
    rules = rules_of_tools(family, PLAIN, special(text), parallel=False)
    spec = in_family(family, text).of_calls(rules)
    for seed in range(4):
        said = written(grammars, text, spec, seed, ENDINGS.get(family, ""))
        assert len(AnswerParser(family_named(family), "", PLAIN).finish(said).calls) == 1


@pytest.mark.parametrize("family", sorted(FORCED))
def test_calls_in_text_are_as_their_schemas_say(
    family: str, grammars: Grammars, text: ModelText, end: int
) -> None:
    rules = rules_of_tools(family, PATTERNED, special(text), parallel=True)
    spec = in_family(family, text).of_text_with_calls(rules)
    spec.check()
    lead = rules.lead or '{"name": '
    begun = text.encode(f"Hm. {lead}" if rules.lead else lead, special=False)
    matcher = grammars.matcher(spec, frozenset({end}), begun)
    assert not matcher.allowed()[end]
    assert matcher.allowed().sum() < 20, "only a call may follow"
    before = "" if family == "llama3" else "Hm. "
    free = grammars.matcher(spec, frozenset({end}), text.encode(before, special=False))
    assert free.allowed()[end]
    assert free.allowed().sum() > 100


NATURAL = [
    *("hermes: all", "hermes: content", "glm: all", "minimax: all", "deepseek-v3.2: all"),
    *("deepseek: of V3.1", "kimi: all", "mistral: a list", "granite: all", "hunyuan: a list"),
    *("llama3: bare", "llama3: no call", "gpt-oss: a call", "gpt-oss: an answer"),
    "hunyuan: an answer",
]


@pytest.mark.parametrize("name", NATURAL)
def test_what_models_write_by_themselves_is_allowed(
    name: str, grammars: Grammars, text: ModelText, end: int
) -> None:
    recorded = RECORDED[name]
    rules = rules_of_tools(recorded.family, RECORDED_TOOLS, special(text), parallel=True)
    spec = in_family(recorded.family, text).of_text_with_calls(rules)
    tokens = text.encode(recorded.text.removesuffix("<|return|>"), special=False)
    assert grammars.matcher(spec, frozenset({end}), tokens).allowed()[end]


def test_a_call_that_is_no_tool_s_is_not_allowed(
    grammars: Grammars, text: ModelText, end: int
) -> None:
    rules = rules_of_tools("gpt-oss", PLAIN, special(text), parallel=True)
    spec = in_family("gpt-oss", text).of_text_with_calls(rules)
    for said in (
        "<|channel|>commentary to=functions.other",
        "<|channel|>analysis to=functions.look",
        "<|start|>assistant to=functions.look",
    ):
        with pytest.raises(InvalidInputError):
            grammars.matcher(spec, frozenset({end}), text.encode(said, special=False))
    allowed = text.encode("<|channel|>analysis<|message|>to= <|end|>", special=False)
    assert grammars.matcher(spec, frozenset({end}), allowed)


def test_a_text_between_tags_has_no_tag(grammars: Grammars, text: ModelText, end: int) -> None:
    rules = rules_of_tools("qwen-coder", PLAIN, special(text), parallel=True)
    spec = in_family("qwen-coder", text).of_calls(rules)
    begun = "<tool_call>\n<function=look>\n<parameter=city>\na < b </a> "
    assert grammars.matcher(spec, frozenset({end}), text.encode(begun, special=False))
    for tag in ("</tool_call>", "<function=", "</parameter> "):
        tokens = text.encode(f"{begun}{tag}", special=False)
        with pytest.raises(InvalidInputError):
            grammars.matcher(spec, frozenset({end}), tokens)


def test_arguments_that_no_schema_names_do_not_come(
    grammars: Grammars, text: ModelText, end: int
) -> None:
    named = {"type": "object", "properties": {"a": {"type": "null"}}}
    rules = rules_of_tools("hermes", [tool("f", named)], special(text), parallel=True)
    spec = in_family("hermes", text).of_calls(rules)
    begun = '<tool_call>\n{"name": "f", "arguments": {"'
    assert grammars.matcher(spec, frozenset({end}), text.encode(f"{begun}a", special=False))
    with pytest.raises(InvalidInputError):
        grammars.matcher(spec, frozenset({end}), text.encode(f"{begun}b", special=False))


CONTENTS = [
    (grammar_of_json_schema(CODE), '{"code": "ABC"}'),
    (grammar_of_regex("[ab]{3}"), "aba"),
    (grammar_of_choice(["yes", "no"]), "yes"),
    (grammar_of_text('root ::= "a" | "b"'), "a"),
    (grammar_of_text('start: "a" | "b"'), "b"),
]


@pytest.mark.parametrize("has_begun", [False, True], ids=["by the model", "by the prompt"])
@pytest.mark.parametrize("family", ["hermes", "mistral", "gemma4"])
@pytest.mark.parametrize(("content", "said"), CONTENTS, ids=lambda one: str(one)[:10])
def test_a_format_holds_after_reasoning(
    content: GrammarSpec,
    said: str,
    family: str,
    has_begun: bool,
    grammars: Grammars,
    text: ModelText,
    end: int,
) -> None:
    reasoning = reasoning_of(family, has_begun=has_begun)
    spec = in_family(family, text, reasoning=reasoning).of_content(content)
    spec.check()
    region = reasoning.region
    opener = "" if has_begun else region.opens[0]

    def ends(answer: str) -> bool:
        matcher = grammars.matcher(spec, frozenset({end}), text.encode(answer, special=False))
        return bool(matcher.allowed()[end]) or matcher.must_end

    assert ends(f"{opener}Hm {{ <{region.closes[0]}\n\n{said}")
    assert ends(f"{opener}Hm{region.closes[0]}{said}")
    if has_begun:
        assert not ends(said)
    else:
        assert ends(said)
    with pytest.raises(InvalidInputError):
        ends(f"{opener}Hm{region.closes[0]}no {said}")


def test_gpt_oss_has_content_in_its_channel(grammars: Grammars, text: ModelText, end: int) -> None:
    reasoning = reasoning_of("gpt-oss")
    answers = in_family("gpt-oss", text, reasoning=reasoning)
    spec = answers.of_content(grammar_of_choice(["yes", "no"]))
    said = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    said += "<|channel|>final<|message|>yes"
    matcher = grammars.matcher(spec, frozenset({end}), text.encode(said, special=False))
    assert matcher.must_end
    piece = AnswerParser(family_named("gpt-oss"), "<|start|>assistant").finish(said)
    assert (piece.reasoning, piece.content) == ("Hm.", "yes")
    with pytest.raises(InvalidInputError):
        grammars.matcher(spec, frozenset({end}), text.encode("yes", special=False))
    continued = in_family("gpt-oss", text, continues=True)
    assert continued.of_content(grammar_of_choice(["yes"])) == grammar_of_choice(["yes"])


@pytest.mark.parametrize("family", ["hermes", "mistral", "gpt-oss"])
def test_an_answer_is_of_a_format_or_calls(
    family: str, grammars: Grammars, text: ModelText
) -> None:
    rules = rules_of_tools(family, PLAIN, special(text), parallel=True)
    content = grammar_of_choice(["yes", "no"])
    spec = in_family(family, text).of_content(content, rules)
    spec.check()
    found = set()
    for seed in range(12):
        said = written(grammars, text, spec, seed)
        piece = AnswerParser(family_named(family), "", PLAIN).finish(said)
        if piece.calls:
            check(piece.calls)
        else:
            assert piece.content in ("yes", "no")
        found.add(bool(piece.calls))
    # gpt-oss has its calls behind the same token.
    assert found == {True, False} or family == "gpt-oss"


def test_reasoning_may_come_before_calls(grammars: Grammars, text: ModelText) -> None:
    rules = rules_of_tools("hermes", PLAIN, special(text), parallel=True)
    reasoning = reasoning_of("hermes", has_begun=True)
    spec = in_family("hermes", text, reasoning=reasoning).of_calls(rules)
    for seed in range(4):
        said = written(grammars, text, spec, seed)
        piece = AnswerParser(family_named("hermes"), "[x]<think>", PLAIN).finish(said)
        check(piece.calls)
        assert piece.content == ""
