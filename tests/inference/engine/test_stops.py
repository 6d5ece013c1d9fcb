"""Text comes whole, in pieces that no later token changes, and ends where it should."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from expertd_inference import GenerationSettings
from expertd_inference.engine.stops import FinishReason, TextPiece, TokenText
from expertd_testing.tiny_models import byte_tokenizer
from expertstore.errors import InvalidInputError

TOKENIZER = byte_tokenizer()
END = TOKENIZER.eos_token_id


class Slow:
    """The same tokens, from a tokenizer that is not of the tokenizers library."""

    def decode(self, tokens: list[int], *, skip_special_tokens: bool) -> str:
        return str(TOKENIZER.decode(tokens, skip_special_tokens=skip_special_tokens))


def ids(text: str) -> list[int]:
    found: list[int] = TOKENIZER(text).input_ids
    return found


def feed(
    tokens: list[int], tokenizer: Any = TOKENIZER, max_new: int | None = None, **wanted: Any
) -> list[TextPiece]:
    """Up to a piece with a finish reason, which the last token's has in any case."""
    max_new = max_new or len(tokens)
    asked = GenerationSettings(max_new_tokens=max_new, **wanted)
    text = TokenText(tokenizer, asked, frozenset([END]), max_new)
    pieces = []
    for token in tokens:
        pieces.append(text.feed(token))
        if pieces[-1].finish_reason is not None:
            break
    return pieces


def text_of(pieces: list[TextPiece]) -> str:
    return "".join(piece.text for piece in pieces)


@settings(max_examples=100, deadline=None)
@given(
    text=st.text(st.sampled_from("abé🎉 "), min_size=2, max_size=25),
    cut=st.integers(0, 1),
    stops=st.lists(st.text(st.sampled_from("abé🎉 "), min_size=1, max_size=4), max_size=3),
    include=st.booleans(),
    slow=st.booleans(),
)
def test_the_pieces_are_the_text_up_to_its_first_stop(
    text: str, cut: int, stops: list[str], *, include: bool, slow: bool
) -> None:
    tokens = ids(text)[cut:]  # which may begin within a character
    pieces = feed(tokens, Slow() if slow else TOKENIZER, stop=tuple(stops), include_stop=include)
    # The naive model: after each token all the text so far, without an unfinished character.
    expected, stop = TOKENIZER.decode(tokens), None
    for end in range(1, len(tokens) + 1):
        whole = TOKENIZER.decode(tokens[:end])
        if whole.endswith("\ufffd"):
            continue
        found = [(whole.find(one), -len(one), one) for one in stops if one in whole]
        if found:
            at, _, stop = min(found)
            expected = whole[: at + len(stop)] if include else whole[:at]
            break
    assert text_of(pieces) == expected
    assert pieces[-1].stop == stop
    assert pieces[-1].finish_reason == (FinishReason.LENGTH if stop is None else FinishReason.STOP)


def test_text_is_held_back_only_while_it_may_be_a_stop() -> None:
    pieces = feed(ids("a STOX STOP b"), stop=("STOP",))
    assert [piece.text for piece in pieces] == [*"a ", "", "", "", "STOX", " ", "", "", "", ""]
    assert pieces[-1] == TextPiece("", FinishReason.STOP, "STOP")


def test_a_character_comes_with_its_last_byte_and_the_end_brings_what_is_left() -> None:
    tokens = ids("é🎉")
    assert [piece.text for piece in feed(tokens)] == ["", "é", "", "", "", "🎉"]
    for tokenizer in (TOKENIZER, Slow()):
        assert text_of(feed(tokens[:-1], tokenizer)) == TOKENIZER.decode(tokens[:-1]) != "é"
        assert text_of(feed(tokens, tokenizer, max_new=5)) == TOKENIZER.decode(tokens[:5])


@pytest.mark.parametrize(
    ("stops", "num_at_once", "expected"),
    [
        (("c", "b"), 1, "b"),  # the first to come
        (("b", "ab"), 1, "ab"),  # of two that end with one token the first to begin
        (("a", "abc", "ab"), 3, "abc"),  # of several at one place the longest
    ],
)
def test_which_of_several_stops_it_was(
    stops: tuple[str, ...], num_at_once: int, expected: str
) -> None:
    pieces = feed(ids("abcd"), stop=stops, min_new_tokens=num_at_once)
    assert pieces[-1].stop == expected
    assert text_of(pieces) == "abcd"[: "abcd".index(expected)]


@pytest.mark.parametrize(
    ("wanted", "reason", "stop", "text"),
    [
        ({}, FinishReason.STOP, END, "ab"),
        ({"ignore_eos": True}, FinishReason.LENGTH, None, "abcd"),
        (
            {"ignore_eos": True, "skip_special_tokens": False},
            FinishReason.LENGTH,
            None,
            "ab<|end|>cd",
        ),
        ({"max_new": 2}, FinishReason.LENGTH, None, "ab"),
        ({"max_new": 3}, FinishReason.STOP, END, "ab"),
        ({"stop_tokens": tuple(ids("b"))}, FinishReason.STOP, ids("b")[0], "ab"),
        ({"min_new_tokens": 4}, FinishReason.LENGTH, None, "abcd"),
        ({"min_new_tokens": 3}, FinishReason.STOP, END, "ab"),
        ({"stop": ("a",), "min_new_tokens": 2}, FinishReason.STOP, END, "ab"),
        ({"stop": ("b",), "min_new_tokens": 2}, FinishReason.STOP, "b", "a"),
    ],
)
def test_where_a_text_ends(
    wanted: dict[str, Any], reason: FinishReason | None, stop: int | str | None, text: str
) -> None:
    pieces = feed([*ids("ab"), END, *ids("cd")], **wanted)
    assert (pieces[-1].finish_reason, pieces[-1].stop) == (reason, stop)
    assert text_of(pieces) == text


def test_the_packs_own_stops_count_as_well() -> None:
    text = TokenText(TOKENIZER, GenerationSettings(), frozenset(), 100, stop=("b",))
    assert [text.feed(token).finish_reason for token in ids("ab")] == [None, FinishReason.STOP]


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"stop": ("a", "")}, "empty text"),
        ({"stop": "abc"}, "give a tuple"),
        ({"temperature": float("nan")}, "temperature is nan"),
        ({"top_p": float("nan")}, "top_p is nan"),
        ({"top_k": -1}, "top_k is -1"),
        ({"min_p": 1.5}, "min_p is 1.5"),
        ({"min_p": float("nan")}, "min_p is nan"),
        ({"repetition_penalty": 0.0}, "repetition_penalty is 0.0"),
        ({"presence_penalty": float("nan")}, "presence_penalty is nan"),
        ({"frequency_penalty": float("inf")}, "frequency_penalty is inf"),
        ({"logit_bias": {5: float("nan")}}, "token 5 is nan"),
        ({"logit_bias": {5: 1e308}}, r"token 5 is 1e\+308; give -1000000000 to"),
        ({"allowed_tokens": ()}, "no token"),
        ({"bad_words": ((1,), ())}, "bad_words has an empty word"),
        ({"min_new_tokens": 200}, "min_new_tokens is 200"),
        ({"logprobs": 21}, "logprobs is 21"),
        ({"prompt_logprobs": -1}, "prompt_logprobs is -1"),
        ({"temperature": "hot"}, r"temperature is 'hot' \(str\); give float"),
        ({"max_new_tokens": 2.5}, r"max_new_tokens is 2.5 \(float\); give int"),
        ({"max_new_tokens": True}, r"max_new_tokens is True \(bool\); give int"),
        ({"top_k": float("nan")}, r"top_k is nan \(float\); give int \| None"),
        ({"stop": (1,)}, r"stop is \(1,\) \(tuple\); give tuple\[str, \.\.\.\]"),
        ({"stop": None}, "stop is None"),
        ({"stop_tokens": 5}, "stop_tokens is 5"),
        ({"bad_words": (1,)}, "bad_words is"),
        ({"logit_bias": [1]}, "logit_bias is"),
        ({"logit_bias": {"a": 1.0}}, "logit_bias is"),
    ],
    ids=str,
)
def test_settings_that_make_no_sense(values: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        GenerationSettings(**values)


def test_lists_and_numbers_of_numpy_do_as_settings() -> None:
    wanted = GenerationSettings(
        stop=["a"],  # type: ignore[arg-type]
        bad_words=[[1]],  # type: ignore[arg-type]
        temperature=np.float32(0.5),  # type: ignore[arg-type]
        max_new_tokens=np.int64(3),  # type: ignore[arg-type]
    )
    assert wanted == GenerationSettings(
        stop=("a",), bad_words=((1,),), temperature=0.5, max_new_tokens=3
    )
    assert type(wanted.max_new_tokens) is int
