"""Each wish of a pack's generation_config.json is done as transformers does it, or refused."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers import GenerationConfig

from expertd_inference import GenerationSettings, Worker, generate
from expertd_inference.model import generation_config as fields_of
from expertd_inference.model.generation_config import read_generation_config
from expertd_inference.process.attachment import attach
from expertd_testing.daemon import serving
from expertstore.errors import InvalidInputError, PackError

Make = Callable[..., Any]

LENGTH = 12
PROMPT = "def main(argument): return 12"


@pytest.fixture(scope="module")
def worker(packed: Make) -> Iterator[Worker]:
    with (
        serving({"m": packed("mixtral")}, ram=64 << 20) as daemon,
        Worker(attach("m", daemon.socket), dtype=torch.float32) as worker,
    ):
        yield worker


@pytest.fixture
def wish(worker: Worker, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., None]:
    """Gives the worker's pack a generation_config.json."""

    def give(**fields: Any) -> None:
        (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": 256} | fields))
        config = read_generation_config(tmp_path, worker.model.config)
        monkeypatch.setattr(worker.model, "generation_config", config)

    return give


def generated(worker: Worker, **settings: Any) -> list[int]:
    done = generate(worker, PROMPT, GenerationSettings(max_new_tokens=LENGTH, **settings))
    return done.result.tokens


def by_stock(model: Any, config: GenerationConfig, worker: Worker, **arguments: Any) -> list[int]:
    ids = torch.tensor([worker.tokenizer(PROMPT).input_ids])
    config = GenerationConfig.from_dict(
        {name: value for name, value in config.to_dict().items() if value is not None} | arguments
    )
    model.generation_config = config
    tokens: list[int] = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=LENGTH,
        pad_token_id=0,
        tokenizer=worker.tokenizer,
    )[0, ids.shape[1] :].tolist()
    return tokens


def test_every_field_is_decided() -> None:
    typed = {name for _, _, names in fields_of._TYPES for name in names}
    ours = typed | fields_of.REFUSED.keys() | fields_of.WITHOUT_EFFECT
    # For other modes than those that are left, and read by nothing else.
    unread = {"continuous_batching_config", "transformers_version"}
    theirs = {name for name in vars(GenerationConfig()) if not name.startswith("_")}
    assert theirs - ours - unread == set(), "fields of a newer transformers"
    if transformers.__version__.startswith("5.24"):
        assert ours - theirs == set(), "fields that there are not"


@pytest.mark.parametrize(
    "fields",
    [
        {"no_repeat_ngram_size": 1},
        {"bad_words_ids": "first"},
        {"suppress_tokens": "first"},
        {"forced_eos_token_id": [65, 66]},
        {"exponential_decay_length_penalty": [2, 4.0]},
        {"eos_token_id": "third", "min_length": 35},
        {"stop_strings": "third"},
        {"watermarking_config": {"bias": 9.0}},
        # What the engine's own tests of wishes (test_wishes.py) do not have.
        {"prefill_chunk_size": 8},
        {"use_cache": False},
        {"length_penalty": 2.0, "early_stopping": True, "low_memory": True},
        {"output_scores": True, "return_dict_in_generate": False, "output_attentions": False},
        {"max_new_tokens": 3, "max_length": 5},
    ],
    ids=str,
)
def test_what_transformers_does(
    fields: dict[str, Any], worker: Worker, wish: Callable[..., None], stock: Make
) -> None:
    wish()
    plain = generated(worker)
    values = {
        "bad_words_ids": [plain[:1]],
        "suppress_tokens": plain[:1],
        "eos_token_id": plain[2],
        "stop_strings": [worker.tokenizer.decode(plain[2])],
    }
    fields = {
        name: values[name] if value in ("first", "third") else value
        for name, value in fields.items()
    }
    wish(**fields)
    expected = by_stock(stock("mixtral", torch.float32), worker.model.generation_config, worker)
    assert generated(worker) == expected


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": []},
        {"stop_strings": []},
        {"cache_implementation": "static"},
        {"cache_implementation": "dynamic"},
        {"cache_implementation": "offloaded"},
        {"cache_implementation": "hybrid"},
        {"prompt_lookup_num_tokens": 3},
        {"return_dict_in_generate": True, "output_scores": True, "output_hidden_states": True},
        {"output_attentions": True},
        {"diversity_penalty": 1.0},
        {"num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1},
        {"speculation_type": "mtp", "assistant_confidence_threshold": 0.1},
        {"a_field_of_another_program": {"x": 1}},
        {"temperature": float("inf"), "top_p": float("nan")},
        {"do_sample": True, "temperature": 5.0},
    ],
    ids=str,
)
def test_what_changes_no_token(
    fields: dict[str, Any], worker: Worker, wish: Callable[..., None]
) -> None:
    wish()
    plain = generated(worker)
    wish(**fields)
    assert generated(worker) == plain


@pytest.mark.parametrize(
    "fields",
    [
        {"num_beams": 4},
        {"num_beams": 4, "num_return_sequences": 2},
        {"num_return_sequences": 2, "do_sample": True},
        {"num_beams": 4, "num_beam_groups": 2},
        {"penalty_alpha": 0.6, "top_k": 4},
        {"dola_layers": "low"},
        {"constraints": [1]},
        {"force_words_ids": [[1]]},
        {"token_healing": True},
        {"is_assistant": True},
        {"assistant_ensemble_weight": 0.5},
        {"cache_implementation": "quantized"},
        {"cache_implementation": "paged"},
        {"bad_words_ids": [[257]]},
        {"sequence_bias": [[[-1], 1.0]]},
        {"forced_eos_token_id": 257},
        {"forced_bos_token_id": [1, 300]},
        {"guidance_scale": 2.0},
        {"max_time": 1000.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_what_is_refused(
    fields: dict[str, Any], temperature: float, worker: Worker, wish: Callable[..., None]
) -> None:
    wish(**fields)
    with pytest.raises(
        InvalidInputError, match=rf"generation_config\.json of .* has .*{next(iter(fields))}"
    ):
        generated(worker, temperature=temperature)


@pytest.mark.parametrize(
    "fields",
    [
        {"no_repeat_ngram_size": 10, "min_length": 3, "exponential_decay_length_penalty": [1, 2.0],
         "eos_token_id": []},
        {"encoder_repetition_penalty": 0.0},
    ],
    ids=str,
)  # fmt: skip
def test_what_transformers_refuses(
    fields: dict[str, Any], worker: Worker, wish: Callable[..., None]
) -> None:
    wish(**fields)
    with pytest.raises(PackError, match=r"cannot do what generation_config\.json of .* asks for"):
        generated(worker)


@pytest.mark.parametrize("penalty", [-1.0, float("nan")])
def test_a_penalty_that_is_none(penalty: float, worker: Worker, wish: Callable[..., None]) -> None:
    wish(repetition_penalty=penalty)
    with pytest.raises(PackError, match=r"generation_config\.json of .* has repetition_penalty"):
        generated(worker)


def test_sampling_is_by_the_pack_unless_told(worker: Worker, wish: Callable[..., None]) -> None:
    wish()
    likeliest = generated(worker)
    for fields in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 1.0}):
        wish(**fields)
        assert generated(worker, temperature=5.0, seed=1) == likeliest, fields
    wish(top_p=1e-6, top_k=-1)
    assert generated(worker, temperature=5.0, seed=1, top_p=1.0) != likeliest


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[]", "no JSON object"),
        ("null", "no JSON object"),
        ("{", "not JSON"),
        ("", "not JSON"),
        ("[" * 100_000, "not JSON"),
        ('{"eos_token_id": "256"}', "eos_token_id is '256', and must be a token's number"),
        ('{"eos_token_id": 2.0}', "eos_token_id is 2.0"),
        ('{"eos_token_id": [1, null]}', "eos_token_id is"),
        ('{"eos_token_id": true}', "eos_token_id is True"),
        ('{"eos_token_id": 99999999999999999999}', "eos_token_id is"),
        ('{"pad_token_id": [0]}', "pad_token_id is"),
        ('{"repetition_penalty": "1.2"}', "repetition_penalty is '1.2', and must be a number"),
        ('{"top_k": "50"}', "top_k is '50'"),
        ('{"top_k": -3}', "top_k is -3, and must be 0 or more, or -1 for none"),
        ('{"max_new_tokens": 0}', "max_new_tokens is 0, and must be a whole number above 0"),
        ('{"num_beams": 2.5}', "num_beams is 2.5"),
        ('{"bad_words_ids": [5]}', "bad_words_ids is"),
        ('{"bad_words_ids": [[]]}', "bad_words_ids is"),
        ('{"suppress_tokens": 5}', "suppress_tokens is 5"),
        ('{"sequence_bias": {"5": 1}}', "sequence_bias is"),
        ('{"exponential_decay_length_penalty": 5}', "exponential_decay_length_penalty is 5"),
        ('{"stop_strings": [""]}', "stop_strings is"),
        ('{"cache_implementation": "unknown"}', "Invalid `cache_implementation`"),
        ('{"watermarking_config": {"nope": 1}}', "cannot be used"),
        ('{"num_return_sequences": 2}', "cannot be used: Greedy methods"),
        ('{"prefill_chunk_size": -1}', "prefill_chunk_size is -1"),
        ('{"do_sample": "yes"}', "do_sample is 'yes'"),
        ('{"logits_processor": 1}', "cannot be used"),
    ],
)
def test_damaged_files(text: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text(text)
    with pytest.raises(PackError, match=r"generation_config\.json") as caught:
        read_generation_config(tmp_path, None)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_that_are_none(tmp_path: Path, worker: Worker) -> None:
    (tmp_path / "generation_config.json").write_bytes(b"\xff\xfe{")
    with pytest.raises(PackError, match="not JSON"):
        read_generation_config(tmp_path, None)
    (tmp_path / "generation_config.json").unlink()
    assert read_generation_config(tmp_path, worker.model.config).eos_token_id == 256
    (tmp_path / "generation_config.json").mkdir()
    with pytest.raises(PackError, match="cannot be read"):
        read_generation_config(tmp_path, None)


def test_the_python_of_json(tmp_path: Path) -> None:
    (tmp_path / "generation_config.json").write_text('{"max_time": Infinity, "top_p": NaN}')
    assert read_generation_config(tmp_path, None).max_time == float("inf")
