"""Calls that a grammar forces: a family's markers, a tool that there is, arguments as it asks."""

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from expertd_inference.engine.budget import EngineLimits
from expertd_inference.engine.engine import Engine
from expertd_inference.grammar import GrammarKind, GrammarSpec
from expertd_inference.server.chat.call_grammar import CallForm, TaggedForm, rules_of_calls
from expertd_inference.settings import GenerationSettings
from expertd_testing.tiny_models import byte_tokenizer
from tests.inference.engine.toy import END, ToyWorker

TOOLS = {
    "look": {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 5}, "days": {"enum": [1, 3]}},
        "required": ["city", "days"],
        "additionalProperties": False,
    },
    "stop/now": {"type": "object", "additionalProperties": False},
}
SPECIAL = {"<|end|>": END}
BYTES = byte_tokenizer()
CLOSING = dict.fromkeys(BYTES('"}', add_special_tokens=False).input_ids, 7.0)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    worker = ToyWorker()
    # The tokenizer's only special token is a marker here.
    worker.generation_config.eos_token_id = None
    with Engine(worker, EngineLimits(max_sequences=4, kv_tokens=2048)) as engine:
        yield engine


def written(engine: Engine, spec: GrammarSpec, **more: Any) -> Iterator[str]:
    wanted = GenerationSettings(max_new_tokens=500, temperature=1.0, grammar=spec)
    wanted = replace(wanted, skip_special_tokens=False, **{"logit_bias": CLOSING, **more})
    for seed in range(6):
        with engine.submit(f"{seed}?", replace(wanted, seed=seed)) as stream:
            tokens = [*stream]
        assert tokens[-1].finish_reason == "stop"
        yield "".join(token.text for token in tokens)


def grammar_of_calls(*arguments: Any, **more: Any) -> GrammarSpec:
    rules = rules_of_calls(*arguments, **more)
    return GrammarSpec(GrammarKind.LARK, "\n".join(["start: calls", *rules]))


def check_call(name: str, arguments: str) -> None:
    given = json.loads(arguments)
    if name == "look":
        assert given.keys() == {"city", "days"}
        assert len(given["city"]) <= 5
        assert given["days"] in {1, 3}
    else:
        assert given == {}


def forms(opening: str, closing: str) -> list[CallForm]:
    return [
        CallForm(opening=opening.replace("NAME", name), schema=schema, closing=closing)
        for name, schema in TOOLS.items()
    ]


def test_one_call_between_markers_of_text(engine: Engine) -> None:
    spec = grammar_of_calls(
        forms('<tool_call>\n{"name": "NAME", "arguments": ', "}\n</tool_call>"), SPECIAL
    )
    names = set()
    for text in written(engine, spec):
        call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
        assert call.keys() == {"name", "arguments"}
        check_call(call["name"], json.dumps(call["arguments"]))
        names.add(call["name"])
    assert names == TOOLS.keys()


def test_spaces_between_arguments_come_to_an_end(engine: Engine) -> None:
    """Else a model that likes them writes nothing else."""
    spec = grammar_of_calls(forms('{"name": "NAME", "arguments": ', "}"), SPECIAL)
    for text in written(engine, spec, logit_bias=dict.fromkeys(BYTES(" ").input_ids, 50.0)):
        call = json.loads(text)
        check_call(call["name"], json.dumps(call["arguments"]))


def test_several_calls_in_a_list_behind_a_special_token(engine: Engine) -> None:
    spec = grammar_of_calls(
        forms('{"name": "NAME", "arguments": ', "}"),
        SPECIAL,
        before="<|end|>[",
        between=", ",
        after="]",
    )
    numbers = set()
    comma = {**CLOSING, BYTES(",").input_ids[0]: 8.0, BYTES("]").input_ids[0]: 8.5}
    for text in written(engine, spec, logit_bias=comma):
        calls = json.loads(text.removeprefix("<|end|>"))
        numbers.add(len(calls))
        for call in calls:
            check_call(call["name"], json.dumps(call["arguments"]))
    assert max(numbers) > 1


@pytest.mark.parametrize("end", ["</", "~<|end|>"], ids=["text", "special"])
def test_arguments_between_tags(end: str, engine: Engine) -> None:
    schema = {
        "properties": {
            "city": {"type": "string"},
            "days": {"type": "integer", "minimum": 1, "maximum": 9},
            "unit": {"enum": ["day", "night"]},
            "where": {"$ref": "#/$defs/place", "type": "array"},
        },
        "required": ["city", "unit"],
        "$defs": {"place": {"type": "array", "items": {"type": "null"}, "maxItems": 1}},
    }
    form = TaggedForm(
        opening="<f=look>",
        argument_opening="<p=KEY>",
        argument_closing=end,
        schema=schema,
        closing="</f>",
        tags=("</",),
    )
    spec = grammar_of_calls([form], SPECIAL)
    towards = dict.fromkeys([*BYTES("</~").input_ids, END], 9.0)
    for text in written(engine, spec, logit_bias={**CLOSING, **towards}):
        body = text.removeprefix("<f=look>").removesuffix("</f>")
        ending = re.escape(end)
        found = re.findall(rf"<p=(\w+)>(.*?){ending}", body, re.DOTALL)
        assert "".join(f"<p={key}>{value}{end}" for key, value in found) == body
        given = dict(found)
        assert [*given] == [key for key in schema["properties"] if key in given]
        assert {"city", "unit"} <= given.keys()
        assert given["unit"] in {"day", "night"}
        assert 1 <= int(given.get("days", 1)) <= 9
        assert json.loads(given.get("where", "[]")) in ([], [None])
