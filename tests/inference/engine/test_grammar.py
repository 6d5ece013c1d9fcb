"""A text is as its grammar says, whatever the model's scores: the toy model's are random."""

import json
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GenerationConfig, LogitsProcessorList, TopKLogitsWarper

from expertd_inference.engine.budget import EngineLimits
from expertd_inference.engine.channel import Channel
from expertd_inference.engine.engine import Engine
from expertd_inference.engine.matcher import Grammars, Matcher
from expertd_inference.engine.sampling import Sampler, Sampling
from expertd_inference.engine.sequence import Origin
from expertd_inference.engine.stops import FinishReason
from expertd_inference.engine.token import Token
from expertd_inference.execution.batch import Batch
from expertd_inference.grammar import (
    MAX_BYTES,
    GrammarKind,
    GrammarSpec,
    grammar_of_choice,
    grammar_of_json_object,
    grammar_of_json_schema,
    grammar_of_regex,
    grammar_of_text,
)
from expertd_inference.settings import GenerationSettings
from expertd_testing.patience import HANG_SECONDS
from expertd_testing.tiny_models import VOCAB, byte_tokenizer
from expertstore.errors import InvalidInputError, PreconditionError
from tests.inference.engine.schemas import SCHEMAS, allows
from tests.inference.engine.toy import END, ToyWorker

TOKENIZER = byte_tokenizer()
PROMPT = "Answer: "
PARENTHESES = """\
root ::= pair+
pair ::= "(" pair* ")" | digit
digit ::= [0-9]
"""
PARENTHESES_LARK = """\
start: pair+
pair: "(" pair* ")" | DIGIT
DIGIT: /[0-9]/
"""


def ids_of(text: str) -> list[int]:
    ids: list[int] = TOKENIZER(text, add_special_tokens=False).input_ids
    return ids


# Else a string goes on for as long as there are more other bytes than quotes.
CLOSING = dict.fromkeys([*ids_of('"}]),'), END], 7.0)
SETTINGS = GenerationSettings(max_new_tokens=400, temperature=1.0, logit_bias=CLOSING)
SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "maxLength": 8},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"enum": ["red", "blue"]}, "maxItems": 2},
    },
    "required": ["name", "size"],
    "additionalProperties": False,
}


def asked(spec: GrammarSpec, seed: int = 0, **more: Any) -> GenerationSettings:
    return replace(SETTINGS, grammar=spec, seed=seed, **more)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with Engine(ToyWorker(), EngineLimits(max_sequences=4, kv_tokens=2048)) as engine:
        yield engine


def text_of(tokens: Sequence[Token]) -> str:
    assert tokens[-1].finish_reason is FinishReason.STOP
    return "".join(token.text for token in tokens)


def written(engine: Engine, spec: GrammarSpec, seed: int = 0, **more: Any) -> str:
    with engine.submit(PROMPT, asked(spec, seed, **more)) as stream:
        return text_of([*stream])


@settings(max_examples=60, deadline=None)
@given(schemas=st.lists(SCHEMAS, min_size=1, max_size=4), seed=st.integers(0, 1000))
def test_json_is_as_its_schema_says(
    schemas: list[dict[str, Any]], seed: int, engine: Engine
) -> None:
    # All at once, so that one sequence's mask for another's would show.
    streams = [engine.submit(PROMPT, asked(grammar_of_json_schema(one), seed)) for one in schemas]
    for schema, stream in zip(schemas, streams, strict=True):
        text = text_of([*stream])
        assert allows(schema, json.loads(text)), text


@pytest.mark.parametrize("temperature", [0.0, 0.7, 1.5])
def test_an_object_is_one(temperature: float, engine: Engine) -> None:
    for seed in range(5):
        text = written(engine, grammar_of_json_object(), seed, temperature=temperature)
        assert isinstance(json.loads(text), dict)


@pytest.mark.parametrize(
    "pattern",
    ["[a-f0-9]{8}", "(yes|no)( sir)?", r"[0-9]{1,4}\.[0-9]", "a*b", "x?", "[☃é]{2,3}", "(?i)hi"],
)
def test_a_whole_text_matches_its_pattern(pattern: str, engine: Engine) -> None:
    for seed in range(6):
        assert re.fullmatch(pattern, written(engine, grammar_of_regex(pattern), seed))


@settings(max_examples=40, deadline=None)
@given(
    choices=st.lists(st.text(st.characters(codec="utf-8"), max_size=8), min_size=1, max_size=5),
    seed=st.integers(0, 1000),
)
def test_a_choice_is_one_of_those_offered(choices: list[str], seed: int, engine: Engine) -> None:
    assert written(engine, grammar_of_choice(choices), seed) in choices


@pytest.mark.parametrize("text", [PARENTHESES, PARENTHESES_LARK], ids=["gbnf", "lark"])
def test_a_grammar_is_obeyed(text: str, engine: Engine) -> None:
    spec = grammar_of_text(text)
    assert spec.kind is (GrammarKind.GBNF if text == PARENTHESES else GrammarKind.LARK)
    for seed in range(8):
        found = written(engine, spec, seed)
        while found != (found := re.sub(r"\(\d*\)|\d", "", found)):
            pass
        assert found == ""


def test_a_text_that_is_gone_on_with_is_the_same(engine: Engine) -> None:
    wanted = asked(grammar_of_json_schema(SCHEMA), 3)
    prompt = engine.encode(PROMPT)
    whole = [token.id for token in engine.submit(prompt, wanted)]
    assert len(whole) > 10
    for num in range(len(whole)):
        channel: Channel[Token] = Channel()
        engine.relay(channel, prompt, wanted, Origin(generated=tuple(whole[:num])))
        rest = []
        while (token := channel.receive()) is not None:
            rest.append(token)
        assert [token.id for token in rest] == whole[num:]
        assert rest[-1].finish_reason is FinishReason.STOP


def test_neighbours_and_preemption_change_nothing() -> None:
    specs = [grammar_of_json_schema(SCHEMA), grammar_of_regex("[a-z]{90}"), None,
             grammar_of_regex("[0-9]{80}")]  # fmt: skip
    wishes = [
        GenerationSettings(
            max_new_tokens=90, temperature=1.0, seed=at, grammar=spec, ignore_eos=spec is None
        )
        for at, spec in enumerate(specs)
    ]

    def texts(engine: Engine, alone: bool) -> list[str]:
        streams = (engine.submit(f"{at}{'.' * 60}", one) for at, one in enumerate(wishes))
        all_streams = streams if alone else [*streams]
        return ["".join(token.text for token in stream) for stream in all_streams]

    with Engine(ToyWorker(), EngineLimits(max_sequences=4, kv_tokens=2048)) as engine:
        expected = texts(engine, alone=True)
        assert engine.stats.num_preemptions == 0
    with Engine(ToyWorker(), EngineLimits(max_sequences=4, kv_tokens=448)) as engine:
        assert texts(engine, alone=False) == expected
        assert engine.stats.num_preemptions > 0


def test_one_that_is_cancelled_leaves_the_others(engine: Engine) -> None:
    endless = asked(grammar_of_regex("[a-z]{300}"))
    with engine.submit(PROMPT, endless) as cancelled:
        next(cancelled)
        other = engine.submit(PROMPT, asked(grammar_of_json_schema(SCHEMA), 1))
        next(other)
        cancelled.cancel()
        assert [*cancelled] == []
        assert "".join(token.text for token in other).endswith("}")
    assert allows(SCHEMA, json.loads(written(engine, grammar_of_json_schema(SCHEMA), 2)))


def test_a_mask_is_computed_while_the_model_computes() -> None:
    worker = ToyWorker()
    with Engine(worker, EngineLimits(max_sequences=4, kv_tokens=2048)) as engine:
        seen = []

        def before(batch: Batch) -> None:
            if batch.num_rows == 1:
                (live,) = engine._loop._live.values()
                assert live.sampler.matcher is not None
                looking = live.sampler.matcher.looking
                assert looking is not None
                looking.result(HANG_SECONDS)
                seen.append(looking)

        worker.executor.before = before
        assert len(written(engine, grammar_of_regex("[a-z]{9}"))) == 9
        assert len({*map(id, seen)}) == 8


@pytest.mark.parametrize("more", [{}, {"ignore_eos": True}, {"min_new_tokens": 20}], ids=str)
def test_a_text_ends_where_nothing_may_follow(more: dict[str, Any], engine: Engine) -> None:
    tokens = [*engine.submit(PROMPT, asked(grammar_of_regex("abc"), **more))]
    assert [token.id for token in tokens] == ids_of("abc")
    assert tokens[-1].finish_reason is FinishReason.STOP


def test_an_empty_text_is_an_end_token(engine: Engine) -> None:
    tokens = [*engine.submit(PROMPT, asked(grammar_of_regex(""), min_new_tokens=5))]
    assert [(token.id, token.text) for token in tokens] == [(END, "")]


def test_the_end_may_be_postponed_but_not_the_grammar_s(engine: Engine) -> None:
    wanted = asked(grammar_of_regex("a+"), min_new_tokens=12, ignore_eos=True)
    tokens = [*engine.submit(PROMPT, wanted)]
    assert tokens[-1].id == END
    assert tokens[-1].finish_reason is FinishReason.STOP
    assert len(tokens) > 12


def test_a_text_that_is_cut_says_so(engine: Engine) -> None:
    tokens = [*engine.submit(PROMPT, asked(grammar_of_regex("[a-z]{50}"), max_new_tokens=7))]
    assert len(tokens) == 7
    assert tokens[-1].finish_reason is FinishReason.LENGTH


def test_other_wishes_choose_among_what_may_follow(engine: Engine) -> None:
    spec = grammar_of_regex("[a-e]{30}")
    a, b, c = ids_of("abc")
    assert written(engine, spec, allowed_tokens=(a, *ids_of("z"))) == "a" * 30
    assert "bb" not in written(engine, spec, bad_words=((b, b),))
    assert {*written(engine, spec, top_k=1, repetition_penalty=1.5)} <= {*"abcde"}
    assert {*written(engine, spec, logit_bias={b: 60.0, c: 60.0})} == {"b", "c"}
    text = "".join(t.text for t in engine.submit(PROMPT, asked(spec, stop=("a",))))
    assert "a" not in text


def test_wishes_that_leave_nothing_end_one_sequence(engine: Engine) -> None:
    other = engine.submit(PROMPT, asked(grammar_of_regex("[a-z]{40}")))
    none_left = engine.submit(
        PROMPT, asked(grammar_of_regex("ab"), allowed_tokens=tuple(ids_of("ac")))
    )
    assert next(none_left).text == "a"
    with pytest.raises(InvalidInputError, match="No token may come next"):
        next(none_left)
    assert len(text_of([*other])) == 40


def test_a_model_without_end_tokens_ends_all_the_same() -> None:
    worker = ToyWorker()
    worker.generation_config = GenerationConfig()
    with Engine(worker, EngineLimits(max_sequences=4, kv_tokens=2048)) as engine:
        assert re.fullmatch("[a-c]{5}", written(engine, grammar_of_regex("[a-c]{5}")))
        with pytest.raises(InvalidInputError, match="none of this model's tokens may follow"):
            engine.submit(PROMPT, asked(grammar_of_regex("")))


def test_transformers_processors_choose_among_what_may_follow() -> None:
    grammars = Grammars(ToyWorker())
    matcher = grammars.matcher(grammar_of_regex("[xy]"), frozenset([END]))
    sampling = Sampling(temperature=1.0, processors=LogitsProcessorList([TopKLogitsWarper(1)]))
    row = torch.arange(VOCAB, dtype=torch.float32).numpy()
    assert Sampler(sampling, 0, 1, matcher).choose(row, [1]) == max(ids_of("xy"))
    grammars.close()


GREEDY = Sampling()


def test_the_likeliest_of_what_may_follow_is_chosen() -> None:
    grammars = Grammars(ToyWorker())
    x, y, z = ids_of("xyz")
    nan, infinite = float("nan"), float("inf")

    def chosen(scores: dict[int, float], sampling: Sampling = GREEDY, seed: int = 0) -> int | None:
        matcher = grammars.matcher(grammar_of_regex("[xy]"), frozenset([END]))
        row = np.zeros(VOCAB, np.float32)
        row[[*scores]] = [*scores.values()]
        return Sampler(sampling, seed, 1, matcher).choose(row, [1])

    assert chosen({x: 2, y: 3, z: 1}) == y
    assert chosen({x: 2, y: 3, z: 4}) == y
    assert chosen({x: 3, y: 3}) == min(x, y)
    assert chosen({x: 3, y: 3, z: 4}) == min(x, y)
    # What may not follow may be no number; what may follow may not.
    assert chosen({x: 3, z: nan}) == x
    assert chosen({x: 3, z: infinite}) == x
    assert chosen({x: 3, y: nan}) is None
    assert chosen({x: 3, y: infinite}) is None
    assert chosen({x: 3, y: 2}, Sampling(logit_bias={y: 2.0})) == y
    assert chosen({x: 3, y: 2}, Sampling(banned_tokens=(x,))) == y
    warm = Sampling(temperature=1.0)
    assert {chosen({x: 3, y: 3}, warm, seed) for seed in range(20)} == {x, y}
    grammars.close()


@pytest.fixture(scope="module")
def grammars() -> Iterator[Grammars]:
    worker = ToyWorker()
    worker.vocabulary = 300  # more than the tokenizer has
    made = Grammars(worker)
    yield made
    made.close()


def may_follow(matcher: Matcher) -> set[int]:
    return {*np.flatnonzero(matcher.allowed()).tolist()}


def test_tokens_that_the_tokenizer_has_not_are_never_allowed(grammars: Grammars) -> None:
    spec = GrammarSpec(GrammarKind.LARK, 'start: "x" | <[290]> | <[257]> | <[256]> "y"')
    matcher = grammars.matcher(spec, frozenset([3, 299]))
    assert len(matcher.allowed()) == 300
    assert may_follow(matcher) == {*ids_of("x"), END}


def test_ends_are_allowed_where_the_grammar_may_end(grammars: Grammars) -> None:
    ends = frozenset([3, END])  # 3 is a byte as well, which the grammar may ask for
    spec = grammar_of_regex("ab(cd)*")
    for text, expected in [
        ("", "a"),
        ("a", "b"),
        ("ab", "c"),
        ("abc", "d"),
        ("abcd", "c"),
    ]:
        matcher = grammars.matcher(spec, ends, ids_of(text))
        ending = ends if re.fullmatch("ab(cd)*", text) else set()
        assert may_follow(matcher) == {*ids_of(expected)} | ending


@pytest.mark.parametrize("spec", [grammar_of_json_object(), grammar_of_json_schema(True)])
def test_spaces_of_json_come_to_an_end(spec: GrammarSpec, grammars: Grammars) -> None:
    """Else a model that likes them writes nothing else."""
    for indent in (None, 2, 8, "\t"):
        text = json.dumps({"a": [{"b": [{}, {"c": 1}]}]}, indent=indent)
        assert END in may_follow(grammars.matcher(spec, frozenset([END]), ids_of(text))), indent
    for spaces in (" " * 40, "\n" + "\t" * 40):
        matcher = grammars.matcher(spec, frozenset([END]), ids_of("{" + spaces))
        assert may_follow(matcher) == {*ids_of('"}')}


WRONG = [
    (grammar_of_json_schema({"type": "strnig"}), "JSON schema cannot be used: .*strnig"),
    (grammar_of_json_schema({"not": {"type": "null"}}), "JSON schema .*not"),
    (grammar_of_json_schema({"allOf": [{"type": "null"}, {"type": "string"}]}), "Unsatisfiable"),
    (grammar_of_json_schema({"$ref": "http://example.org/schema"}), "JSON schema .*retriev"),
    (GrammarSpec(GrammarKind.JSON_SCHEMA, "[1"), "JSON schema cannot be used"),
    (GrammarSpec(GrammarKind.JSON_SCHEMA, "[1]"), "it is no JSON object"),
    (GrammarSpec(GrammarKind.JSON_SCHEMA, '{"a":' * 2000), "JSON schema cannot be used"),
    (grammar_of_regex("(a"), "regular expression cannot be used: .*unclosed group"),
    (grammar_of_regex("(?=a)b"), "look-around"),
    (grammar_of_regex(r"[^\s\S]"), "regular expression cannot be used: no text fits it"),
    (grammar_of_json_schema({"$ref": "#"}), "JSON schema cannot be used: no text fits it"),
    (grammar_of_text("start: start"), "Lark grammar cannot be used: no text fits it"),
    (grammar_of_regex("\ud800"), "regular expression cannot be used"),
    (grammar_of_choice([]), "choice cannot be used: it has no text"),
    (GrammarSpec(GrammarKind.CHOICE, '{"a": 1}'), "choice cannot be used"),
    (grammar_of_text("root ::= foo"), "GBNF grammar cannot be used: Rule 'foo' not found"),
    (grammar_of_text('root ::= "a'), "GBNF grammar cannot be used"),
    (grammar_of_text("root ::= " + "(" * 5000), "GBNF grammar cannot be used"),
    (grammar_of_text("start: foo"), "Lark grammar cannot be used: .*foo"),
    (grammar_of_regex("a" * (MAX_BYTES + 1)), f"has {MAX_BYTES + 1} bytes; give at most"),
]


@pytest.mark.parametrize(("spec", "words"), WRONG, ids=lambda x: str(x)[:60])
def test_what_is_no_grammar_is_refused(spec: GrammarSpec, words: str, engine: Engine) -> None:
    num_steps = engine.stats.num_steps
    for refused in (spec.check, lambda: engine.submit(PROMPT, asked(spec))):
        with pytest.raises(InvalidInputError, match=words) as raised:
            refused()
        message = str(raised.value)
        assert "\n" not in message
        assert len(message) < 500
        assert message.endswith(".")
    assert engine.stats.num_steps == num_steps


@pytest.mark.parametrize(
    "spec", [grammar_of_regex(r"[^\s\S]"), grammar_of_text('start: a\na: a "x"')], ids=str
)
def test_a_grammar_without_texts_is_refused(spec: GrammarSpec, engine: Engine) -> None:
    with pytest.raises(InvalidInputError, match="cannot be used"):
        engine.submit(PROMPT, asked(spec))


def test_a_special_token_is_checked_by_the_engine(engine: Engine) -> None:
    unknown = GrammarSpec(GrammarKind.LARK, 'start: "a" <|nope|>')
    unknown.check()
    with pytest.raises(InvalidInputError, match="unknown special token"):
        engine.submit(PROMPT, asked(unknown))
    known = GrammarSpec(GrammarKind.LARK, 'start: "a" <|end|>')
    tokens = [*engine.submit(PROMPT, asked(known))]
    assert [token.id for token in tokens] == [*ids_of("a"), END]


def test_a_kind_may_be_given_by_its_name_and_there_are_no_others() -> None:
    assert GrammarSpec("regex", "a") == grammar_of_regex("a")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="kind is 'xml'"):
        GrammarSpec("xml")  # type: ignore[arg-type]


def test_without_the_library_a_grammar_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    with pytest.raises(PreconditionError, match=r"pip install 'expertd\[serve\]'"):
        grammar_of_regex("a").check()
    worker = ToyWorker()
    with Engine(worker, EngineLimits(max_sequences=4, kv_tokens=2048)) as engine:
        assert len([*engine.submit(PROMPT, replace(SETTINGS, max_new_tokens=2))]) == 2
        with pytest.raises(PreconditionError, match="llguidance"):
            engine.submit(PROMPT, asked(grammar_of_regex("a")))
