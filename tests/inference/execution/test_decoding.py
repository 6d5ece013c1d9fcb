"""The loop of our own gives the tokens of transformers' loop, and leaves it what is not plain."""

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    GenerationMixin,
    LogitsProcessor,
    MixtralConfig,
    PhimoeConfig,
)
from transformers.generation.streamers import BaseStreamer

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import SCHEMES
from expertd_inference import GenerationSettings, Worker, generate
from expertd_inference.execution.decoding import _HOOKS, Decoding, has_own_steps, is_repeatable
from expertd_inference.process.attachment import attach
from expertd_testing.daemon import serving
from expertd_testing.tiny_models import byte_tokenizer, make_checkpoint
from expertstore.errors import PreconditionError
from tests.inference.greedy import greedy, prompt_of

Make = Callable[..., Any]


class Recorder(BaseStreamer):  # type: ignore[misc] # transformers is untyped
    def __init__(self, stop_after: int | None = None) -> None:
        self.pieces: list[list[int]] = []
        self.ended = 0
        self._stop_after = stop_after

    def put(self, value: torch.Tensor) -> None:
        self.pieces.append(value.flatten().tolist())
        if self._stop_after is not None and len(self.pieces) > self._stop_after:
            raise KeyboardInterrupt

    def end(self) -> None:
        self.ended += 1


class NeverTwice(LogitsProcessor):  # type: ignore[misc] # transformers is untyped
    """Sees all tokens so far, and forbids them."""

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        return scores.index_fill(1, input_ids[0], -torch.inf)

    def __repr__(self) -> str:
        # In the test's name, which must be the same in every process.
        return "NeverTwice"


def both(model: Any, ids: torch.Tensor, seed: int = 0, **arguments: Any) -> tuple[Any, Any]:
    """What our loop gives and what transformers' gives."""
    results = []
    for ours in (True, False):
        torch.manual_seed(seed)
        extra = {"custom_generate": Decoding()} if ours else {}
        results.append(model.generate(ids, pad_token_id=0, **arguments, **extra))
    return results[0], results[1]


@pytest.mark.parametrize("architecture", ["mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3"])
@pytest.mark.parametrize("prompt_tokens", [1, 70])  # 70: past the window of gpt_oss
def test_greedy_tokens_are_the_same(architecture: str, prompt_tokens: int, stock: Make) -> None:
    ids = torch.tensor([prompt_of(prompt_tokens)])
    with mock.patch.object(Decoding, "_decode", autospec=True, side_effect=Decoding._decode) as own:
        ours, theirs = both(stock(architecture), ids, max_new_tokens=12, do_sample=False)
    assert own.called
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0},
        {"do_sample": True, "top_k": 5},
        {"do_sample": False, "repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"do_sample": False, "min_new_tokens": 6, "eos_token_id": list(range(0, 256, 2))},
        {"do_sample": False, "eos_token_id": list(range(256))},
        {"do_sample": False, "logits_processor": [NeverTwice()]},
    ],
    ids=str,
)
@pytest.mark.parametrize("seed", [0, 1])
def test_settings_mean_the_same(arguments: dict[str, Any], seed: int, stock: Make) -> None:
    ids = torch.tensor([prompt_of(9, seed=seed)])
    ours, theirs = both(stock("olmoe"), ids, seed, max_new_tokens=16, **arguments)
    assert ours.tolist() == theirs.tolist()


def test_more_tokens_than_there_was_room_for(stock: Make) -> None:
    ids = torch.tensor([prompt_of(3)])
    ours, theirs = both(
        stock("mixtral"), ids, max_new_tokens=300, min_new_tokens=300, do_sample=False
    )
    assert ours.shape == (1, 303)
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_return_sequences": 2, "do_sample": True},
        {"num_beams": 3, "do_sample": False},
        {"num_beams": 3, "do_sample": True},
        {"return_dict_in_generate": True, "output_scores": True, "do_sample": False},
        {"use_cache": False, "do_sample": False},
        {"cache_implementation": "static", "do_sample": False},
        {"prefill_chunk_size": 4, "do_sample": False},
    ],
    ids=str,
)
def test_what_is_not_plain_goes_to_transformers(arguments: dict[str, Any], stock: Make) -> None:
    ids = torch.tensor([prompt_of(9)])
    with mock.patch.object(Decoding, "_decode", side_effect=AssertionError):
        ours, theirs = both(stock("mixtral"), ids, max_new_tokens=6, **arguments)
    if arguments.get("return_dict_in_generate"):
        ours, theirs = ours.sequences, theirs.sequences
    assert ours.tolist() == theirs.tolist()


def test_models_with_steps_of_their_own() -> None:
    """Every model that transformers' loop asks for more than a forward pass goes there."""
    theirs = {
        name
        for name, function in vars(GenerationMixin).items()
        if f"self.{name}(" in inspect.getsource(GenerationMixin._sample) and callable(function)
    }
    # What says when to end, on several hosts, and how to compile.
    assert theirs - set(_HOOKS) == {"_has_unfinished_sequences", "_valid_auto_compile_criteria"}
    for name, own in {
        "PhimoeForCausalLM": True,
        "NemotronHForCausalLM": True,
        "Qwen3VLMoeForConditionalGeneration": True,
        "MixtralForCausalLM": False,
        "GptOssForCausalLM": False,
        "DeepseekV3ForCausalLM": False,
    }.items():
        assert (
            has_own_steps(getattr(transformers, name).__new__(getattr(transformers, name))) is own
        )


@pytest.mark.parametrize(
    ("config", "repeatable"),
    [
        (MixtralConfig(), True),
        (MixtralConfig(rope_parameters={"rope_type": "dynamic", "factor": 2.0}), False),
        (MixtralConfig(rope_parameters={"rope_type": "linear", "factor": 2.0}), True),
        (PhimoeConfig(), False),
    ],
)
def test_steps_that_can_be_recorded(config: Any, repeatable: bool) -> None:
    kind = type(config).__name__.removesuffix("Config") + "ForCausalLM"
    model = getattr(transformers, kind).__new__(getattr(transformers, kind))
    model.__dict__["config"] = config
    assert is_repeatable(model) is repeatable


@pytest.fixture(scope="module")
def long_rope(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Phi-MoE whose angles are others from 64 tokens on."""
    path = tmp_path_factory.mktemp("phimoe")
    rope = {
        "rope_type": "longrope",
        "rope_theta": 10_000.0,
        "short_factor": [1.0] * 16,
        "long_factor": [1 + 0.5 * i for i in range(16)],
        "short_mscale": 1.0,
        "long_mscale": 1.3,
        "original_max_position_embeddings": 64,
        "factor": 8.0,
    }
    return make_checkpoint(
        "phimoe", path, original_max_position_embeddings=64, rope_parameters=rope
    )


def test_a_text_that_outgrows_the_original_context(long_rope: Path, tmp_path: Path) -> None:
    pack(Request(long_rope, tmp_path / "pack", SCHEMES["bf16"]))
    prompt = "def f(x): return x * x + 1 # a comment to 56 bytes ....."
    assert len(prompt) == 56
    with (
        serving({"m": tmp_path / "pack"}) as daemon,
        Worker(attach("m", daemon.socket)) as worker,
    ):
        result = generate(worker, prompt, GenerationSettings(max_new_tokens=40)).result
    stock = AutoModelForCausalLM.from_pretrained(long_rope, dtype=torch.bfloat16)
    ids = byte_tokenizer()(prompt).input_ids
    assert result.tokens == greedy(stock, ids, 40)
    assert result.decoding == "modules (PhimoeForCausalLM prepares each step in its own way)"


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}], ids=str)
def test_scores_that_are_no_numbers(arguments: Any, sample: bool, stock: Make) -> None:
    model = stock("mixtral")
    ids = torch.tensor([prompt_of(9)])
    healthy = model.lm_head.weight.data[7].clone()
    model.lm_head.weight.data[7] = torch.nan
    try:
        with pytest.raises(PreconditionError, match=r"not finite.*in bfloat16.*--dtype float32"):
            model.generate(
                ids,
                custom_generate=Decoding(),
                do_sample=sample,
                max_new_tokens=3,
                pad_token_id=0,
                **arguments,
            )
    finally:
        model.lm_head.weight.data[7] = healthy


@pytest.mark.parametrize("padded", [True, False])
def test_batches_and_padding_go_to_transformers(padded: bool, stock: Make) -> None:
    ids = torch.tensor([prompt_of(9)] if padded else [prompt_of(9), prompt_of(9, seed=1)])
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    with mock.patch.object(Decoding, "_decode", side_effect=AssertionError):
        ours, theirs = both(
            stock("mixtral"), ids, attention_mask=mask, max_new_tokens=6, do_sample=False
        )
    assert ours.tolist() == theirs.tolist()


def test_the_streamer_gets_every_token(stock: Make) -> None:
    ids = torch.tensor([prompt_of(5)])
    recorder = Recorder()
    out = stock("mixtral").generate(
        ids,
        max_new_tokens=4,
        do_sample=False,
        streamer=recorder,
        custom_generate=Decoding(recorder),
        pad_token_id=0,
    )
    assert recorder.pieces == [out[0, :5].tolist(), *([token] for token in out[0, 5:].tolist())]
    assert recorder.ended == 1


def test_an_interrupt_leaves_the_loop(stock: Make) -> None:
    recorder = Recorder(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        stock("mixtral").generate(
            torch.tensor([prompt_of(5)]),
            max_new_tokens=50,
            streamer=recorder,
            custom_generate=Decoding(recorder),
            pad_token_id=0,
        )
    assert len(recorder.pieces) == 4, "the prompt and three tokens"
