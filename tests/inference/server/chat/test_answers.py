"""Answers are read the same however their text comes in pieces."""

import json
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd_inference.engine.stops import FinishReason
from expertd_inference.engine.token import Token
from expertd_inference.server.chat.answer import AnswerParser, AnswerReader, Piece
from expertd_inference.server.chat.families import FAMILIES, Family, family_named
from tests.inference.server.chat.recorded import NOW, RECORDED, TOOLS, Recorded

NAMES = list(RECORDED)
Read = tuple[str, str, tuple[tuple[str, dict[str, Any]], ...]]


def read(recorded: Recorded, pieces: Sequence[str], tools: Any = TOOLS) -> Read:
    """Reasoning, content and calls of a text in pieces."""
    return read_by(family_named(recorded.family), recorded.prompt, pieces, tools)


def read_by(family: Family, prompt: str, pieces: Sequence[str], tools: Any = TOOLS) -> Read:
    parser = AnswerParser(family, prompt, tools)
    return together([*(parser.feed(piece) for piece in pieces), parser.finish()])


def together(pieces: Sequence[Piece]) -> Read:
    return (
        "".join(piece.reasoning for piece in pieces),
        "".join(piece.content for piece in pieces),
        tuple((call.name, json.loads(call.arguments)) for piece in pieces for call in piece.calls),
    )


def expected(recorded: Recorded) -> Read:
    return recorded.reasoning, recorded.content, recorded.calls


@pytest.mark.parametrize("name", NAMES)
def test_cut_in_two_anywhere(name: str) -> None:
    recorded = RECORDED[name]
    for at in range(len(recorded.text) + 1):
        assert read(recorded, [recorded.text[:at], recorded.text[at:]]) == expected(recorded), at


@pytest.mark.parametrize("name", NAMES)
def test_character_by_character(name: str) -> None:
    assert read(RECORDED[name], RECORDED[name].text) == expected(RECORDED[name])


@given(st.sampled_from(NAMES), st.lists(st.integers(0, 9)))
@settings(deadline=None)
def test_in_pieces_of_the_size_of_tokens(name: str, sizes: list[int]) -> None:
    rest = RECORDED[name].text
    pieces = []
    for size in sizes:
        pieces.append(rest[:size])
        rest = rest[size:]
    assert read(RECORDED[name], [*pieces, rest]) == expected(RECORDED[name])


@st.composite
def scrambled(draw: st.DrawFn) -> tuple[str, list[str]]:
    """A family, and parts of its recorded texts in any order."""
    family = draw(st.sampled_from([family.name for family in FAMILIES]))
    parts = {"\n", " ", "a", "{", "}", '"', "<", "é"}
    for recorded in RECORDED.values():
        if recorded.family == family:
            parts |= {recorded.text[at : at + 12] for at in range(0, len(recorded.text), 5)}
    parts |= family_named(family).markers(tools=True)
    return family, draw(st.lists(st.sampled_from(sorted(parts)), max_size=20))


@given(scrambled())
@settings(deadline=None, max_examples=300)
def test_no_text_fails_and_no_cut_changes_it(case: tuple[str, list[str]]) -> None:
    family, parts = case
    recorded = Recorded(family, "")
    text = "".join(parts)
    whole = read(recorded, [text])
    assert read(recorded, parts) == whole
    assert read(recorded, text) == whole


@pytest.mark.parametrize("name", [name for name in NAMES if RECORDED[name].calls])
def test_without_tools_nothing_is_a_call(name: str) -> None:
    recorded = RECORDED[name]
    reasoning, content, calls = read(recorded, [recorded.text], tools=None)
    assert calls == ()
    assert recorded.calls[0][0] in reasoning + content


def test_ids_are_unique_or_the_model_s_own() -> None:
    def ids(name: str) -> list[str]:
        recorded = RECORDED[name]
        parser = AnswerParser(family_named(recorded.family), recorded.prompt, TOOLS)
        return [call.id for call in parser.finish(recorded.text).calls]

    hermes = ids("hermes: all")
    assert len(set(hermes)) == 2
    assert all(one.startswith("call_") for one in hermes)
    assert ids("kimi: all") == ["functions.get_weather:0", "functions.now:1"]
    first, second = ids("mistral: by names")
    assert (len(first), first.isalnum(), second) == (9, True, "abcdefghi")


def test_a_call_cut_at_its_length_is_content() -> None:
    text = RECORDED["qwen-coder: all"].text.partition("\n</parameter>\n</function>")[0]
    parser = AnswerParser(family_named("qwen-coder"), "", TOOLS)
    piece = parser.finish(text, cut=True)
    assert piece.calls == ()
    assert piece.content == text


def _tokens(*texts: str, reason: FinishReason = FinishReason.STOP) -> list[Token]:
    tokens = [Token(id_, text) for id_, text in enumerate(texts)]
    last = tokens[-1]
    return [*tokens[:-1], Token(last.id, last.text, finish_reason=reason)]


def test_a_reader_counts_and_names_the_end() -> None:
    now = RECORDED["hermes: all"].text.partition("\n<tool_call>\n")[2]
    tokens = _tokens("<think>", "Hm", "</think>", "<tool_call>" + now, "<|im_end|>")
    reader = AnswerReader(
        AnswerParser(family_named("hermes"), "", TOOLS), {4: "<|im_end|>"}, max_calls=1
    )
    pieces = [reader.feed(token) for token in tokens]
    assert together(pieces)[1] == "Done."
    assert (reader.num_calls, reader.num_reasoning_tokens) == (1, 3)
    assert reader.finish_reason == "tool_calls"
    cut = AnswerReader(AnswerParser(family_named("hermes"), "", TOOLS))
    for token in _tokens("<think>", "Hm", reason=FinishReason.LENGTH):
        cut.feed(token)
    assert cut.finish_reason == "length"
    assert cut.num_calls == 0


def test_what_is_certain_is_passed_on_at_once() -> None:
    parser = AnswerParser(family_named("hermes"), "", TOOLS)
    assert [parser.feed(one).content for one in ("Hel", "lo <", "b> ", "you\n", "<tool")] == [
        *("Hel", "lo", " <b>", " you", ""),
    ]
    piece = parser.feed('_call>{"name": "now"}</tool_call>')
    assert [(call.name, call.arguments) for call in piece.calls] == [(NOW[0], "{}")]


def test_two_calls_never_have_one_id() -> None:
    call = "<|tool_call_begin|>functions.now:0<|tool_call_argument_begin|>{}<|tool_call_end|>"
    first, second = AnswerParser(family_named("kimi"), "", TOOLS).finish(call * 2).calls
    assert first.id == "functions.now:0"
    assert second.id.startswith("call_")


@pytest.mark.parametrize(
    ("prompt", "is_fresh"),
    [
        ("<|im_start|>assistant\n", True),
        ("<|im_start|>assistant\n<think>\n", True),
        ("<|im_start|>assistant\n<think>\n\n</think>\n\n", False),
        ("<|im_start|>assistant\nYes", False),
    ],
)
def test_whether_an_answer_is_to_begin(prompt: str, is_fresh: bool) -> None:
    assert AnswerParser(family_named("hermes"), prompt, TOOLS).is_fresh == is_fresh
