"""What a client asks for, as the engine gets it."""

from typing import Any

import msgspec
import pytest

from expertd_inference.engine.token import Token
from expertd_inference.server.api.errors import ApiError, api_error_of
from expertd_inference.server.api.sampling_fields import NO_LIMIT, SamplingFields
from expertd_inference.settings import GenerationSettings
from expertstore.errors import SettingError


class Text:
    """In place of a ModelText: its tokens are the letters' numbers."""

    temperature = 0.7

    def encode(self, text: str, *, special: bool) -> list[int]:
        assert not special
        return [ord(letter) for letter in text]


def fields(**body: Any) -> SamplingFields:
    return msgspec.convert(body, SamplingFields)


def settings(max_new_tokens: int = 9, logprobs: int | None = None, /, **body: Any) -> Any:
    return fields(**body).settings(Text(), max_new_tokens, logprobs)  # type: ignore[arg-type]


def test_more_tokens_than_any_context_has() -> None:
    assert settings(10**30).max_new_tokens == NO_LIMIT


def test_every_field_reaches_the_engine() -> None:
    asked = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "logit_bias": {"7": -1.5},
        "allowed_token_ids": [7, 8],
        "bad_words": ["ab", "c"],
        "seed": 11,
        "stop": ["x", "y"],
        "stop_token_ids": [3],
        "min_tokens": 9,
        "ignore_eos": True,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
        "prompt_logprobs": 2,
        "experts_per_token": 2,
        "expert_threshold": 0.1,
    }
    assert settings(9, 20, **asked) == GenerationSettings(
        max_new_tokens=9,
        temperature=0.5,
        top_p=0.9,
        seed=11,
        top_k=5,
        min_p=0.1,
        repetition_penalty=1.1,
        presence_penalty=0.2,
        frequency_penalty=0.3,
        logit_bias={7: -1.5},
        allowed_tokens=(7, 8),
        bad_words=((97, 98), (99,)),
        stop=("x", "y"),
        stop_tokens=(3,),
        min_new_tokens=9,
        ignore_eos=True,
        include_stop=True,
        skip_special_tokens=False,
        logprobs=20,
        prompt_logprobs=2,
        experts_per_token=2,
        expert_threshold=0.1,
    )


def test_what_is_left_out_is_the_model_s() -> None:
    assert settings(NO_LIMIT) == GenerationSettings(max_new_tokens=NO_LIMIT, temperature=0.7)
    assert settings(1, 0) == GenerationSettings(max_new_tokens=1, temperature=0.7, logprobs=0)


def test_values_that_other_servers_take() -> None:
    assert settings(top_k=-1).top_k == 0
    assert settings(seed=-1).seed == (1 << 64) - 1
    assert settings(stop="one").stop == ("one",)
    assert settings(timings_per_token=False).stop == ()


def test_whose_sequence_it_is() -> None:
    origin = fields(priority=3, cache_salt="s").origin("alice", 2)
    assert (origin.user, origin.priority, origin.salt, origin.continuation) == ("alice", -3, "s", 2)
    assert fields().origin("bob", 0).salt == ""


def test_which_stop_is_told() -> None:
    asked = fields(stop_token_ids=[5])
    stops = [asked.stop_of(Token(1, "", stop=stop)) for stop in ("x", 5, 6, None)]
    assert stops == ["x", 5, msgspec.UNSET, msgspec.UNSET]


def test_a_prompt_s_last_tokens() -> None:
    cut = [fields(truncate_prompt_tokens=most).cut([1, 2, 3]) for most in (None, -1, 1, 2, 9)]
    assert cut == [[1, 2, 3], [1, 2, 3], [3], [2, 3], [1, 2, 3]]
    for most in (0, -2):
        with pytest.raises(ApiError, match=f"truncate_prompt_tokens is {most}"):
            fields(truncate_prompt_tokens=most).cut([1])


def test_limits() -> None:
    assert fields().num_choices == 1
    assert fields(n=128, best_of=128).num_choices == 128
    assert len(settings(stop=["x"] * 16).stop) == 16
    for body, param in (
        ({"n": 129}, "n"),
        ({"n": 0}, "n"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"best_of": 2}, "best_of"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"min_tokens": 10}, "min_tokens"),
        ({"logits_processors": []}, "logits_processors"),
        ({"return_tokens_as_token_ids": True}, "return_tokens_as_token_ids"),
    ):
        with pytest.raises((ApiError, SettingError)) as refused:
            _ = fields(**body).num_choices, settings(**body)
        assert api_error_of(refused.value).param == param
    for max_new_tokens, logprobs, param in (
        (0, None, "max_tokens"),
        (1, 21, "logprobs"),
        (1, -1, "logprobs"),
    ):
        with pytest.raises(SettingError) as refused_setting:
            settings(max_new_tokens, logprobs)
        assert api_error_of(refused_setting.value).param == param


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ({"temperature": -1}, "temperature is -1.0; give 0 to 100."),
        ({"top_p": 0}, "top_p is 0.0; give more than 0 and at most 1."),
        ({"min_p": 2}, "min_p is 2.0; give 0 to 1."),
        ({"frequency_penalty": 101}, "frequency_penalty is 101.0; give -100 to 100; 0 is none."),
        ({"min_tokens": -1}, "min_tokens is -1; give 0 to 9, the most tokens that may come."),
        (
            {"allowed_token_ids": []},
            "allowed_token_ids has no token; give at least one, or leave it out.",
        ),
        ({"prompt_logprobs": 21}, "prompt_logprobs is 21; give 0 to 20, or leave it out."),
        ({"bad_words": [""]}, "bad_words has an empty word; leave that word out."),
        ({"stop": ""}, "stop has an empty text, which is everywhere; leave that text out."),
    ],
)
def test_an_error_names_the_field_as_clients_call_it(body: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingError) as refused:
        settings(**body)
    told = api_error_of(refused.value)
    assert (told.message, told.param) == (message, next(iter(body)))


@pytest.mark.parametrize("key", [" 1_0 ", "+1", "-1", "1.0", "\u0661", "", "x", "1" * 5000])
def test_a_bias_is_of_a_token_in_plain_digits(key: str) -> None:
    with pytest.raises(ApiError, match="logit_bias has the key") as refused:
        settings(logit_bias={key: 1})
    assert refused.value.param == "logit_bias"
    assert len(refused.value.message) < 200
    assert settings(logit_bias={"10": 1}).logit_bias == {10: 1}


def test_any_object_by_vllm_s_field() -> None:
    found = settings(structured_outputs={"json_object": True}).grammar
    assert found == settings(response_format={"type": "json_object"}).grammar
    assert found is not None
    assert settings(structured_outputs={"json_object": False}).grammar is None
