"""Tools and reasoning over HTTP, from a model that says what was written beforehand."""

import json
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2
import pytest

from expertd_inference.grammar import GrammarSpec
from expertd_inference.server.chat.recognition import family_of
from expertd_inference.server.hosting.model_text import ModelText
from expertd_testing.recital import RecitedModel, make_tokenizer, reciting_client
from tests.inference.server.chat.recorded import RECORDED, TOOLS

SPECIAL = ("<|im_start|>", "<|tool_call>", "<tool_call|>", '<|"|>', "<|channel>", "<channel|>")
TEMPLATE = """\
{%- if tools %}<|im_start|>tools {{ tools | map(attribute='function.name') | join(',') }}
{% endif %}
{%- for message in messages -%}
<|im_start|>{{ message.role }}
{{ message.content }}
{%- for call in message.tool_calls or [] %}
<tool_call>{{ call.function | tojson }}</tool_call>
{%- endfor %}<|im_end|>
{% endfor %}
{%- if add_generation_prompt %}<|im_start|>assistant
{% if enable_thinking %}<think>
{% endif %}{% endif %}"""
GEMMA = "{{ messages[0].content }}{{ '<|tool_call>' if false }}"
MESSAGES = [{"role": "user", "content": "Hello"}]
HERMES = RECORDED["hermes: all"]


@dataclass
class Recital:
    """The model, and a client of its server."""

    model: RecitedModel
    client: httpx2.AsyncClient

    async def ask(self, recital: str, **body: Any) -> dict[str, Any]:
        self.model.recitals.append(recital)
        response = await self.client.post(
            "/v1/chat/completions", json={"messages": MESSAGES, **body}
        )
        assert response.status_code == 200, response.text
        answer: dict[str, Any] = response.json()
        return answer

    async def stream(self, recital: str, **body: Any) -> list[dict[str, Any]]:
        self.model.recitals.append(recital)
        response = await self.client.post(
            "/v1/chat/completions", json={"messages": MESSAGES, "stream": True, **body}
        )
        lines = [line for line in response.text.splitlines() if line]
        assert lines.pop() == "data: [DONE]"
        return [json.loads(line.removeprefix("data: ")) for line in lines]


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory, *SPECIAL)
    return directory


@pytest.fixture
async def recital(pack: Path) -> AsyncIterator[Recital]:
    model = RecitedModel(ModelText("recited", pack, TEMPLATE))
    async with reciting_client(pack, model) as client:
        yield Recital(model, client)


@pytest.fixture
async def gemma(pack: Path) -> AsyncIterator[Recital]:
    model = RecitedModel(ModelText("recited", pack, GEMMA))
    async with reciting_client(pack, model) as client:
        yield Recital(model, client)


def calls_of(message: dict[str, Any]) -> list[tuple[str, Any]]:
    return [
        (call["function"]["name"], json.loads(call["function"]["arguments"]))
        for call in message["tool_calls"]
    ]


async def test_an_answer_has_reasoning_content_and_calls(recital: Recital) -> None:
    answer = await recital.ask(HERMES.text, tools=TOOLS)
    (choice,) = answer["choices"]
    message = choice["message"]
    assert message["reasoning_content"] == message["reasoning"] == HERMES.reasoning
    assert message["content"] == HERMES.content
    assert calls_of(message) == [*HERMES.calls]
    assert {call["type"] for call in message["tool_calls"]} == {"function"}
    assert choice["finish_reason"] == "tool_calls"
    details = answer["usage"]["completion_tokens_details"]
    assert details["reasoning_tokens"] == len(">\nHm, weather.\n</think>")
    assert "tools get_weather,now" in recital.model.prompts[0]


async def test_only_calls_have_no_content_and_one_of_them_is_enough(recital: Recital) -> None:
    two = RECORDED["mistral: a list"].text
    recital.model.text.chat_format = "mistral"
    (choice,) = (await recital.ask(two, tools=TOOLS))["choices"]
    assert choice["message"]["content"] is None
    assert len(choice["message"]["tool_calls"]) == 2
    (choice,) = (await recital.ask(two, tools=TOOLS, parallel_tool_calls=False))["choices"]
    assert len(choice["message"]["tool_calls"]) == 1


async def test_a_stream_says_the_same_a_token_an_event(recital: Recital) -> None:
    usage = {"include_usage": True}
    events = await recital.stream(HERMES.text, tools=TOOLS, stream_options=usage)
    deltas = [event["choices"][0]["delta"] for event in events[:-1]]
    assert deltas[0] == {"role": "assistant", "content": ""}
    assert deltas[-1] == {}
    # The end's token, too, has its event; a token that gives nothing has an empty one.
    assert len(deltas) == len(HERMES.text) + 1 + 2
    assert all(delta.get("content") != "" for delta in deltas[1:])
    joined = {
        name: "".join(delta.get(name) or "" for delta in deltas)
        for name in ("content", "reasoning_content", "reasoning")
    }
    assert joined["reasoning"] == joined["reasoning_content"] == HERMES.reasoning
    assert joined["content"] == HERMES.content
    calls = [call for delta in deltas for call in delta.get("tool_calls") or []]
    assert [call["index"] for call in calls] == [0, 1]
    assert calls_of({"tool_calls": calls}) == [*HERMES.calls]
    assert events[-2]["choices"][0]["finish_reason"] == "tool_calls"
    assert events[-1]["usage"]["completion_tokens_details"]["reasoning_tokens"] == 23


async def test_a_prompt_that_begins_to_think(recital: Recital) -> None:
    thinks = {"chat_template_kwargs": {"enable_thinking": True}}
    (choice,) = (await recital.ask("Hm.</think>\n\nYes.", **thinks))["choices"]
    assert choice["message"]["reasoning"] == "Hm."
    assert choice["message"]["content"] == "Yes."
    (choice,) = (await recital.ask("Yes.", **thinks, reasoning_effort="none"))["choices"]
    assert choice["message"]["reasoning"] == "Yes."
    (choice,) = (await recital.ask("Yes.", reasoning_effort="none"))["choices"]
    assert choice["message"] == {"role": "assistant", "content": "Yes.", "refusal": None}


async def test_markers_that_are_special_tokens_are_seen_and_no_others(gemma: Recital) -> None:
    recorded = RECORDED["gemma4: all"]
    (choice,) = (await gemma.ask(recorded.text, tools=TOOLS))["choices"]
    assert not gemma.model.settings[0].skip_special_tokens
    assert choice["message"]["content"] == recorded.content
    assert choice["message"]["reasoning"] == recorded.reasoning
    assert calls_of(choice["message"]) == [*recorded.calls]
    (choice,) = (await gemma.ask("Yes<|im_start|>.<|tool_call>"))["choices"]
    assert choice["message"]["content"] == "Yes."
    (choice,) = (await gemma.ask("Yes<|im_start|>.", skip_special_tokens=False))["choices"]
    assert choice["message"]["content"] == "Yes<|im_start|>.<|im_end|>"


async def test_a_call_s_result_goes_back_to_the_model(recital: Recital) -> None:
    answer = await recital.ask(HERMES.text, tools=TOOLS)
    message = answer["choices"][0]["message"]
    results = [
        {"role": "tool", "tool_call_id": call["id"], "content": "12 °C"}
        for call in message["tool_calls"]
    ]
    await recital.ask("Cold.", tools=TOOLS, messages=[*MESSAGES, message, *results])
    call = '{"name": "get_weather", "arguments": {"city": "Paris", "days": 3}}'
    assert call in recital.model.prompts[1]
    assert recital.model.prompts[1].count("<|im_start|>tool\n12 °C") == 2


FORMAT = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"enum": ["a"]}}}
STRICT = [{**TOOLS[1], "function": {**TOOLS[1]["function"], "strict": True}}]


async def grammar_of(recital: Recital, **body: Any) -> GrammarSpec | None:
    await recital.ask("Yes.", **body)
    return recital.model.settings[-1].grammar


async def test_which_grammar_an_answer_has(recital: Recital) -> None:
    thinks: dict[str, Any] = {"chat_template_kwargs": {"enable_thinking": True}}
    assert await grammar_of(recital, tools=TOOLS, **thinks) is None
    cases: list[tuple[dict[str, Any], str]] = [({}, "prelude: ("), (thinks, "prelude: reasoning")]
    for begun, prelude in cases:
        required = await grammar_of(recital, tools=TOOLS, tool_choice="required", **begun)
        assert required is not None
        assert "start: prelude calls\n" in required.text
        assert prelude in required.text
        content = await grammar_of(recital, response_format=FORMAT, **begun)
        assert content is not None
        assert content.kind == "json_schema"
        assert prelude in content.frame
        assert "calls" not in content.frame
        either = await grammar_of(recital, response_format=FORMAT, tools=TOOLS, **begun)
        assert either is not None
        assert "( @inner | calls)" in either.frame
    text = await grammar_of(recital, tools=STRICT)
    assert text is not None
    assert "start: TEXT?" in text.text
    assert await grammar_of(recital, tools=STRICT, tool_choice="none") is None
    begun = [*MESSAGES, {"role": "assistant", "content": "So: "}]
    going_on = {"continue_final_message": True, "add_generation_prompt": False}
    content = await grammar_of(recital, response_format=FORMAT, messages=begun, **going_on)
    assert content is not None
    assert not content.frame


async def test_a_format_holds_from_the_first_token_where_none_reasons(gemma: Recital) -> None:
    grammar = await grammar_of(gemma, response_format=FORMAT)
    assert grammar is not None
    assert "prelude: (<[" in grammar.frame
    gemma.model.text.chat_format = "plain"
    family_of.cache_clear()
    grammar = await grammar_of(gemma, response_format=FORMAT)
    assert grammar is not None
    assert not grammar.frame


async def test_a_model_that_knows_no_calls_writes_those_of_another(recital: Recital) -> None:
    recital.model.text.chat_format = "plain"
    answer = await recital.ask(HERMES.text, tools=TOOLS, tool_choice="required")
    assert calls_of(answer["choices"][0]["message"]) == [*HERMES.calls]
    answer = await recital.ask(HERMES.text, tools=TOOLS)
    assert answer["choices"][0]["message"]["content"] == HERMES.text


@pytest.mark.parametrize(
    ("choice", "offered"),
    [
        ("auto", "get_weather,now"),
        ("none", None),
        (
            {
                "type": "allowed_tools",
                "allowed_tools": {
                    "mode": "auto",
                    "tools": [{"type": "function", "function": {"name": "now"}}],
                },
            },
            "now",
        ),
    ],
)
async def test_a_choice_of_tools(recital: Recital, choice: Any, offered: str | None) -> None:
    text = RECORDED["hermes: reasoning left by a call"].text
    answer = await recital.ask(text, tools=TOOLS, tool_choice=choice)
    if offered is None:
        assert "tools" not in recital.model.prompts[0]
        assert answer["choices"][0]["message"]["content"] == text
        assert answer["choices"][0]["finish_reason"] == "stop"
    else:
        assert f"tools {offered}\n" in recital.model.prompts[0]
        assert answer["choices"][0]["finish_reason"] == "tool_calls"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"tools": [{"type": "custom"}]}, 'tools[0].type is "custom"'),
        ({"tools": [{"type": "function"}]}, "tools[0].function has no name"),
        (
            {"tools": [{"type": "function", "function": {"name": "a b"}}]},
            "give one without spaces, quotes and brackets",
        ),
        (
            {"tools": [{"type": "function", "function": {"name": "f", "parameters": 3}}]},
            "give a JSON schema",
        ),
        ({"tool_choice": "required"}, "wants a call, and there are no tools"),
        ({"tools": TOOLS, "tool_choice": "sometimes"}, 'tool_choice is "sometimes"'),
        (
            {"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "g"}}},
            "names 'g', which is not among the tools",
        ),
        ({"tools": TOOLS, "tool_choice": {"type": "function"}}, "which names no function"),
        (
            {
                "tools": TOOLS,
                "tool_choice": {
                    "type": "allowed_tools",
                    "mode": "x",
                    "tools": [{"type": "function", "name": "now"}],
                },
            },
            "has the mode 'x'; give auto or required",
        ),
        ({"functions": []}, "functions is the old form of tools"),
        ({"function_call": "auto"}, "function_call is the old form of tools"),
    ],
)
async def test_what_is_no_tool_is_refused(
    recital: Recital, body: dict[str, Any], message: str
) -> None:
    response = await recital.client.post(
        "/v1/chat/completions", json={"messages": MESSAGES, **body}
    )
    assert response.status_code == 400
    assert message in response.json()["error"]["message"]
