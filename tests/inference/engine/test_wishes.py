"""What a pack's generation_config.json wishes is done as transformers' generate does it."""

from collections.abc import Callable, Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import GenerationConfig

from expertd_inference import GenerationSettings
from expertd_inference.engine.sampling import Chosen, Sampler, Sampling, choose
from expertd_inference.engine.stops import TokenText
from expertd_inference.engine.wishes import resolve
from expertd_testing.tiny_models import byte_tokenizer
from expertstore.errors import InvalidInputError, PackError, PreconditionError

Make = Callable[..., Any]

LENGTH = 12
TOKENIZER = byte_tokenizer()
PROMPT: list[int] = TOKENIZER("def main(argument): return 12").input_ids
END = 256


@pytest.fixture(scope="module")
def model(stock: Make) -> Iterator[Any]:
    model = stock("mixtral")
    before = model.generation_config
    yield model
    model.generation_config = before


def config_of(**fields: Any) -> GenerationConfig:
    return GenerationConfig.from_dict({"eos_token_id": END} | fields)


def worker_of(model: Any, config: GenerationConfig) -> Any:
    return SimpleNamespace(
        model=model, generation_config=config, vocabulary=END + 1, context_tokens=None
    )


def generated(model: Any, config: GenerationConfig, **settings: Any) -> list[int]:
    """As an engine does it, one token after another."""
    asked = GenerationSettings(max_new_tokens=LENGTH, **settings)
    wishes = resolve(asked, worker_of(model, config), PROMPT)
    sampler = Sampler(wishes.sampling, asked.seed or 0, len(PROMPT))
    text = TokenText(TOKENIZER, asked, wishes.end_tokens, LENGTH, wishes.stop)
    tokens = list(PROMPT)
    while True:
        with torch.no_grad():
            logits = model(torch.tensor([tokens])).logits[:, -1]
        (chosen,) = choose(logits, [sampler], [tokens])
        if isinstance(chosen, PreconditionError):
            raise chosen
        tokens.append(chosen.token)
        if text.feed(chosen.token).finish_reason is not None:
            return tokens[len(PROMPT) :]


def by_stock(model: Any, config: GenerationConfig) -> list[int]:
    ids = torch.tensor([PROMPT])
    model.generation_config = GenerationConfig.from_dict(
        {name: value for name, value in config.to_dict().items() if value is not None}
    )
    tokens: list[int] = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LENGTH,
        pad_token_id=0,
        tokenizer=TOKENIZER,
    )[0, ids.shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize(
    "fields",
    [
        {"repetition_penalty": 1.5},
        {"encoder_repetition_penalty": 1.5},
        {"no_repeat_ngram_size": 1},
        {"encoder_no_repeat_ngram_size": 1},
        {"bad_words_ids": "first"},
        {"suppress_tokens": "first"},
        {"suppress_tokens": "first", "repetition_penalty": 1.5, "no_repeat_ngram_size": 2},
        {"begin_suppress_tokens": "first"},
        {"sequence_bias": "first"},
        {"forced_bos_token_id": 65},
        {"forced_eos_token_id": 65},
        {"forced_eos_token_id": [65, 66]},
        {"exponential_decay_length_penalty": [2, 4.0]},
        {"eos_token_id": "third"},
        {"eos_token_id": "third", "min_new_tokens": 9},
        {"eos_token_id": "third", "min_length": 35},
        {"eos_token_id": "third", "min_length": 35, "no_repeat_ngram_size": 2},
        {"eos_token_id": -1},
        {"eos_token_id": [256, 100_000]},
        {"eos_token_id": [256, -5], "min_new_tokens": 4},
        {"stop_strings": "third"},
        {"watermarking_config": {"bias": 9.0}},
        {"renormalize_logits": True},
        {"remove_invalid_values": True},
        {"top_k": 2, "top_p": 0.5, "min_p": 0.1, "typical_p": 0.5},
        {"temperature": float("inf"), "top_p": float("nan")},
    ],
    ids=str,
)
def test_wishes_are_done_as_transformers_does_them(fields: dict[str, Any], model: Any) -> None:
    plain = by_stock(model, config_of())
    values = {
        "bad_words_ids": [plain[:1]],
        "suppress_tokens": [*plain[:1], 100_000],
        "begin_suppress_tokens": plain[:1],
        "sequence_bias": [[plain[:1], -20.0]],
        "eos_token_id": plain[2],
        "stop_strings": [TOKENIZER.decode(plain[2])],
    }
    fields = {
        name: values[name] if value in ("first", "third") else value
        for name, value in fields.items()
    }
    ours = generated(model, config_of(**fields))
    fields.pop("top_p", None) if "temperature" in fields else None
    fields.pop("temperature", None)
    assert ours == by_stock(model, config_of(**fields))


def test_sampling_is_by_the_pack_unless_told(model: Any) -> None:
    likeliest = generated(model, config_of())
    hot = {"temperature": 5.0, "seed": 1}
    for fields in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert generated(model, config_of(**fields), **hot) == likeliest, fields
        # With a wish that transformers does, all are its own.
        assert generated(model, config_of(typical_p=0.99, **fields), **hot) == likeliest, fields
    for settings in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        assert generated(model, config_of(), **hot, **settings) == likeliest, settings
    assert generated(model, config_of(top_p=1e-6, top_k=-1), **hot, top_p=1.0) != likeliest
    assert generated(model, config_of(top_k=1), **hot, top_k=0) != likeliest


def resolved(config: GenerationConfig, model: Any = None, **settings: Any) -> Sampling:
    asked = GenerationSettings(max_new_tokens=LENGTH, **settings)
    return resolve(asked, worker_of(model, config), PROMPT).sampling


def test_without_wishes_nothing_is_changed() -> None:
    """And nothing is done by transformers, which is slow."""
    plain = resolved(config_of(), temperature=1.0)
    assert plain == Sampling(temperature=1.0, end_tokens=(END,))
    for fields in ({"renormalize_logits": False}, {"typical_p": None}, {"top_k": None}):
        assert resolved(config_of(**fields), temperature=1.0) == plain


def test_what_wishes_come_to(model: Any) -> None:
    found = resolved(config_of(top_k=3, top_p=1.0, min_p=0.0, min_length=35), temperature=1.0)
    assert (found.top_k, found.top_p, found.min_p) == (3, 1.0, 0.0)
    assert found.min_new_tokens == 35 - len(PROMPT)
    assert resolved(config_of(renormalize_logits=True), model).processors is not None
    for fields in ({"top_p": 0.0}, {"top_p": 1.1}, {"min_p": -0.1}, {"min_p": 1.1}):
        with pytest.raises(PackError, match="it must be"):
            resolved(config_of(**fields), temperature=1.0)


def test_the_context_may_be_the_end_that_is_forced(model: Any) -> None:
    worker = worker_of(model, config_of(forced_eos_token_id=65))
    worker.context_tokens = len(PROMPT) + 3
    sampling = resolve(GenerationSettings(max_new_tokens=LENGTH), worker, PROMPT).sampling
    sampler, tokens = Sampler(sampling, 0, len(PROMPT)), list(PROMPT)
    for _ in range(3):
        (chosen,) = choose(torch.zeros(1, END + 1), [sampler], [tokens])
        assert isinstance(chosen, Chosen)
        tokens.append(chosen.token)
    assert [token == 65 for token in tokens[len(PROMPT) :]] == [False, False, True]


def test_a_setting_goes_before_the_packs_wish(model: Any) -> None:
    plain = generated(model, config_of())
    repeats = config_of(repetition_penalty=0.01)
    assert generated(model, repeats) != plain
    assert generated(model, repeats, repetition_penalty=1.0) == plain


@pytest.mark.parametrize(
    ("fields", "kind", "words"),
    [
        ({"num_beams": 4}, InvalidInputError, "has num_beams 4"),
        ({"guidance_scale": 2.0}, InvalidInputError, "has guidance_scale 2.0"),
        ({"max_time": 3.0}, InvalidInputError, "has max_time 3.0"),
        ({"sequence_bias": [[[257], 1.0]]}, InvalidInputError, "token 257 in sequence_bias"),
        ({"repetition_penalty": -1.0}, PackError, "repetition_penalty -1.0"),
        ({"repetition_penalty": float("nan")}, PackError, "repetition_penalty nan"),
        ({"encoder_repetition_penalty": 0.0}, PackError, "cannot do what"),
        (
            {"exponential_decay_length_penalty": [1, 2.0], "eos_token_id": []},
            PackError,
            "cannot do what",
        ),
    ],
    ids=str,
)
def test_wishes_that_cannot_be_done(
    fields: dict[str, Any], kind: type[Exception], words: str, model: Any
) -> None:
    with pytest.raises(kind, match=words) as raised:
        generated(model, config_of(**fields))
    assert "generation_config.json of " in str(raised.value)


def test_a_sampler_that_fails_fails_alone(model: Any) -> None:
    def fail(*_: Any) -> Any:
        raise IndexError("no such row")

    wishes = resolve(GenerationSettings(), worker_of(model, config_of()), PROMPT)
    good = Sampler(wishes.sampling, 0, len(PROMPT))
    bad = Sampler(replace(wishes.sampling, processors=fail), 0, len(PROMPT))
    first, second = choose(torch.zeros(2, END + 1), [good, bad], [PROMPT, PROMPT])
    assert isinstance(first, Chosen)
    assert isinstance(second, PreconditionError)
    assert "no such row" in str(second)
