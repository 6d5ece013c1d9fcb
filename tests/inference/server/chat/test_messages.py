"""Messages of the system, in templates of four kinds."""

from pathlib import Path
from typing import Any

import pytest

from expertd_inference.server.api.errors import ApiError
from expertd_inference.server.chat.prompt import Chat, prompt_of
from expertd_inference.server.hosting.model_text import ModelText
from expertd_testing.recital import make_tokenizer
from expertstore.errors import InvalidInputError

TAKES = "{% for one in messages %}[{{ one.role }}]{{ one.content | trim }}{% endfor %}"
REFUSES = """\
{%- for one in messages -%}
{%- if one.role == 'system' and not loop.first -%}
{{ raise_exception('System message must be at the beginning.') }}
{%- endif -%}
[{{ one.role }}]{{ one.content | trim }}
{%- endfor -%}"""
LEAVES_OUT = """\
{%- if messages[0].role == 'system' -%}[system]{{ messages[0].content }}{%- endif -%}
{%- for one in messages if one.role != 'system' -%}
[{{ one.role }}]{{ one.content }}
{%- endfor -%}"""

KNOWS_NONE = """\
{%- for one in messages -%}
{%- if one.role == 'system' or one.role == messages[loop.index0 - 1].role and not loop.first -%}
{{ raise_exception('Roles must be user and assistant in turns.') }}
{%- endif -%}
[{{ one.role }}]{{ one.content | trim }}
{%- endfor -%}"""

CALLS = [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]


def said(role: str, content: str) -> dict[str, Any]:
    return {"role": role, "content": content}


CHAT = (
    said("system", "Be kind."),
    said("developer", "Be brief."),
    said("user", "One?"),
    said("system", "Today is Monday. "),
    said("user", "Two?"),
    said("assistant", "Three."),
    said("system", "Use no tools."),
)


@pytest.fixture(scope="module")
def pack(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("tokenizer")
    make_tokenizer(directory)
    return directory


def rendered(pack: Path, template: str, *messages: dict[str, Any]) -> str:
    return prompt_of(ModelText("model", pack, template), Chat(messages=messages)).prompt


def test_a_template_that_takes_them_gets_them(pack: Path) -> None:
    assert rendered(pack, TAKES, *CHAT) == (
        "[system]Be kind.[system]Be brief.[user]One?[system]Today is Monday.[user]Two?"
        "[assistant]Three.[system]Use no tools."
    )


@pytest.mark.parametrize("template", [REFUSES, LEAVES_OUT])
def test_a_template_that_does_not_has_them_told_by_the_user(pack: Path, template: str) -> None:
    assert rendered(pack, template, *CHAT) == (
        "[system]Be kind.\n\nBe brief.[user]One?\n\nToday is Monday. \n\nTwo?"
        "[assistant]Three.[user]Use no tools."
    )


def test_a_template_that_knows_no_system_has_all_told_by_the_user(pack: Path) -> None:
    assert rendered(pack, KNOWS_NONE, *CHAT) == (
        "[user]Be kind.\n\nBe brief.\n\nOne?\n\nToday is Monday. \n\nTwo?"
        "[assistant]Three.[user]Use no tools."
    )


IN_TURNS = """\
{%- for one in messages -%}
{%- if (one.role == 'user') != (loop.index0 % 2 == 0) -%}
{{ raise_exception('Roles must alternate user/assistant/...') }}
{%- endif -%}
[{{ one.role }}]{{ one.content }}
{%- endfor -%}"""
USER_AND_ASSISTANT = """\
{%- for one in messages if one.role in ('user', 'assistant') -%}
[{{ one.role }}]{{ one.content }}
{%- endfor -%}"""


@pytest.mark.parametrize(
    ("messages", "prompt"),
    [
        ([said("user", "a"), said("user", "b")], "[user]a\n\nb"),
        ([said("system", "s"), said("user", "a")], "[user]s\n\na"),
        (
            [said("user", "a"), said("assistant", "b"), said("assistant", "c"), said("user", "d")],
            "[user]a[assistant]b\n\nc[user]d",
        ),
        (
            [said("user", "a"), said("assistant", "b"), said("system", "s"), said("user", "c")],
            "[user]a[assistant]b[user]s\n\nc",
        ),
    ],
)
def test_a_template_of_turns_gets_turns(
    pack: Path, messages: list[dict[str, Any]], prompt: str
) -> None:
    assert rendered(pack, IN_TURNS, *messages) == prompt


@pytest.mark.parametrize(
    "messages",
    [
        [said("assistant", "a"), said("user", "b")],
        [said("user", "a"), {**said("assistant", ""), "tool_calls": CALLS}, said("tool", "r")],
    ],
)
def test_what_no_turns_can_say_is_refused(pack: Path, messages: list[dict[str, Any]]) -> None:
    words = r"does not take these messages: Roles must alternate user/assistant/\.\.\.; send"
    with pytest.raises(InvalidInputError, match=words):
        rendered(pack, IN_TURNS, *messages)


def test_a_first_system_message_is_not_left_out(pack: Path) -> None:
    told = rendered(pack, USER_AND_ASSISTANT, said("system", " "), said("user", "a"))
    assert told == "[user]a"
    told = rendered(pack, USER_AND_ASSISTANT, said("system", "s"), said("user", "a"))
    assert told == "[user]s\n\na"


def test_results_of_tools_are_not_left_out(pack: Path) -> None:
    calls = {**said("assistant", ""), "tool_calls": CALLS}
    chat = [said("user", "a"), calls, said("tool", "user")]
    with pytest.raises(ApiError, match="has results of tools, which the chat template of model"):
        rendered(pack, USER_AND_ASSISTANT, *chat)
    assert rendered(pack, TAKES, *chat) == "[user]a[assistant][tool]user"
    empty = [*chat[:2], said("tool", "")]
    assert rendered(pack, USER_AND_ASSISTANT, *empty) == "[user]a[assistant]"


def test_another_refusal_is_one(pack: Path) -> None:
    template = "{{ raise_exception('No.') }}"
    for messages in (CHAT, [said("user", "One?")]):
        with pytest.raises(InvalidInputError, match="does not take these messages: No;"):
            rendered(pack, template, *messages)


def test_content_of_parts_is_one_text(pack: Path) -> None:
    parts: Any = ["One?", {"type": "text", "text": "Two?"}, {"type": "refusal", "refusal": "No."}]
    assert rendered(pack, TAKES, {"role": "user", "content": parts}) == "[user]One?\nTwo?\nNo."


@pytest.mark.parametrize(
    ("message", "words"),
    [
        (
            {"role": "user", "content": [{"type": "text", "text": 3}]},
            r"\[0\].text is 3; give a text",
        ),
        ({"role": "assistant", "tool_calls": [{"id": "a"}]}, "has no function with a name"),
        ({"role": "assistant", "tool_calls": [3]}, "has no function with a name"),
    ],
)
def test_messages_that_say_nothing(pack: Path, message: dict[str, Any], words: str) -> None:
    with pytest.raises(ApiError, match=words):
        rendered(pack, TAKES, message)
