"""Each family's calls, forced from a model that knows none of it."""

import json
import re
from collections.abc import Iterator
from typing import Any

import pytest

from expertd_inference.engine.budget import EngineLimits
from expertd_inference.engine.engine import Engine
from expertd_inference.server.chat.forced_calls import FORCED, grammar_of_tools
from expertd_inference.settings import GenerationSettings
from expertd_testing.tiny_models import byte_tokenizer
from tests.inference.engine.toy import END, ToyWorker

TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "look",
            "parameters": {
                "type": "object",
                "properties": {
                    "city": {"enum": ["Rome", "Oslo"]},
                    "days": {"type": "integer", "minimum": 1, "maximum": 9},
                },
                "required": ["city", "days"],
                "additionalProperties": False,
            },
        },
    },
    {"type": "function", "function": {"name": "wait"}},
]
JSON = r"(?P<json>\{.*\})"
LISTED = r'\{"name": "(?P<name>\w+)", "arguments": ' + JSON + r"\}"
FORMS = {
    "gpt-oss": r"<\|channel\|>commentary to=functions\.(?P<name>\w+) "
    r"<\|constrain\|>json<\|message\|>" + JSON + r"<\|call\|>",
    "deepseek": r"<\uff5ctool▁calls▁begin\uff5c><\uff5ctool▁call▁begin\uff5c>"
    r"(?P<name>\w+)<\uff5ctool▁sep\uff5c>"
    + JSON
    + "<\uff5ctool▁call▁end\uff5c><\uff5ctool▁calls▁end\uff5c>",
    "kimi": r"<\|tool_calls_section_begin\|><\|tool_call_begin\|>functions\.(?P<name>\w+):0"
    r"<\|tool_call_argument_begin\|>" + JSON + r"<\|tool_call_end\|><\|tool_calls_section_end\|>",
    "minimax": r'<minimax:tool_call>\n<invoke name="(?P<name>\w+)">\n'
    r'(<parameter name="city">(?P<city>\w+)</parameter>\n'
    r'<parameter name="days">(?P<days>\d)</parameter>\n)?</invoke>\n</minimax:tool_call>',
    "mistral": r"\[TOOL_CALLS\]\[" + LISTED + r"\]",
    "hunyuan": r"<tool_calls>\[" + LISTED + r"\]</tool_calls>",
    "granite": r"<\|tool_call\|>\[" + LISTED + r"\]",
    "glm": r"<tool_call>(?P<name>\w+)\n"
    r"(<arg_key>city</arg_key>\n<arg_value>(?P<city>\w+)</arg_value>\n"
    r"<arg_key>days</arg_key>\n<arg_value>(?P<days>\d)</arg_value>\n)?</tool_call>",
    "qwen-coder": r"<tool_call>\n<function=(?P<name>\w+)>\n"
    r"(<parameter=city>\n(?P<city>\w+)\n</parameter>\n"
    r"<parameter=days>\n(?P<days>\d)\n</parameter>\n)?</function>\n</tool_call>",
    "hermes": r"<tool_call>\n" + LISTED + r"\n</tool_call>",
    "llama3": r'\{"name": "(?P<name>\w+)", "parameters": ' + JSON + r"\}",
}
CLOSING = dict.fromkeys(byte_tokenizer()('"}:,', add_special_tokens=False).input_ids, 7.0)


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    worker = ToyWorker()
    # The tokenizer's only special token is a marker here.
    worker.generation_config.eos_token_id = None
    with Engine(worker, EngineLimits(max_sequences=4, kv_tokens=2048)) as engine:
        yield engine


def written(engine: Engine, family: str, **more: Any) -> Iterator[str]:
    arguments: dict[str, Any] = {"special_tokens": {}, "parallel": False, **more}
    spec = grammar_of_tools(family, TOOLS, **arguments)
    assert spec is not None
    for seed in range(4):
        wanted = GenerationSettings(
            max_new_tokens=400,
            temperature=1.0,
            seed=seed,
            grammar=spec,
            logit_bias=CLOSING,
            skip_special_tokens=False,
        )
        with engine.submit(f"{seed}?", wanted) as stream:
            tokens = [*stream]
        assert tokens[-1].finish_reason == "stop"
        yield "".join(token.text for token in tokens)


@pytest.mark.parametrize("family", sorted(FORCED))
def test_a_call_has_the_form_of_its_family(family: str, engine: Engine) -> None:
    for text in written(engine, family):
        call = re.fullmatch(FORMS[family], text, re.DOTALL)
        assert call, text
        found = call.groupdict()
        given = json.loads(found["json"]) if "json" in found else None
        if found["name"] == "wait":
            assert not given
            assert not found.get("city")
        else:
            given = given or {"city": found["city"], "days": int(found["days"])}
            assert given.keys() == {"city", "days"}
            assert given["city"] in {"Rome", "Oslo"}
            assert 1 <= given["days"] <= 9


def test_markers_that_are_tokens_are_those_tokens(engine: Engine) -> None:
    special = {"[TOOL_CALLS]": END, "[ARGS]": END}
    for text in written(engine, "mistral", special_tokens=special):
        assert re.fullmatch(r"<\|end\|>\w+<\|end\|>\{.*\}", text, re.DOTALL), text


def test_a_family_without_a_form_has_none() -> None:
    assert grammar_of_tools("plain", TOOLS, {}, parallel=True) is None
