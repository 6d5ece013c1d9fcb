"""transformers' generate by the engine gives the tokens of its own loop, which gets the rest."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import AutoModelForCausalLM, LogitsProcessor
from transformers.generation.stopping_criteria import StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from expertd.packing.packer import Request, pack
from expertd.packing.schemes import SCHEMES
from expertd_inference import GenerationSettings, Worker, generate, load_model
from expertd_inference.engine.decoding import Decoding
from expertd_inference.process.attachment import attach
from expertd_testing.daemon import Daemon, serving
from expertd_testing.tiny_models import byte_tokenizer, make_checkpoint
from expertstore.errors import PreconditionError
from tests.inference.greedy import greedy, prompt_of

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def daemon(packed: Make) -> Iterator[Daemon]:
    names = ("mixtral", "gpt_oss", "olmoe")
    with serving({name: packed(name) for name in names}, ram=64 << 20) as daemon:
        yield daemon


@pytest.fixture(scope="module")
def mixtral(daemon: Daemon) -> Iterator[Any]:
    model = load_model("mixtral", socket=daemon.socket)
    yield model
    model.expertd.close()


@pytest.fixture(scope="module")
def exact_mixtral(daemon: Daemon) -> Iterator[Any]:
    """In float32: rounded otherwise, two scores may be so near that tokens differ."""
    model = load_model("mixtral", socket=daemon.socket, dtype=torch.float32)
    yield model
    model.expertd.close()


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


class Broken(LogitsProcessor):  # type: ignore[misc] # transformers is untyped
    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        raise ZeroDivisionError("of a processor")


class AfterTwelve(StoppingCriteria):  # type: ignore[misc] # transformers is untyped
    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        return torch.tensor([input_ids.shape[1] >= 12])

    def __repr__(self) -> str:
        return "AfterTwelve"


def both(model: Any, ids: torch.Tensor, **arguments: Any) -> tuple[Any, Any]:
    """What the engine gives and what transformers' loop gives."""
    results = []
    for ours in (True, False):
        torch.manual_seed(0)
        extra = {"custom_generate": Decoding()} if ours else {}
        results.append(model.generate(ids, pad_token_id=0, **arguments, **extra))
    return results[0], results[1]


@pytest.mark.parametrize("prompt_tokens", [1, 70])  # 70: past the window of gpt_oss
def test_greedy_tokens_are_the_same(prompt_tokens: int, daemon: Daemon) -> None:
    ids = torch.tensor([prompt_of(prompt_tokens)])
    model = load_model("gpt_oss", socket=daemon.socket, dtype=torch.float32)
    with mock.patch.object(Decoding, "_decode", autospec=True, side_effect=Decoding._decode) as own:
        ours, theirs = both(model, ids, max_new_tokens=12, do_sample=False)
    model.expertd.close()
    assert own.called
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize(
    "arguments",
    [
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 2},
        {"min_new_tokens": 6, "eos_token_id": list(range(0, 256, 2))},
        {"eos_token_id": list(range(256))},
        {"logits_processor": [NeverTwice()]},
        {"stopping_criteria": [AfterTwelve()]},
        {"do_sample": True, "top_k": 1},
    ],
    ids=str,
)
def test_settings_mean_the_same(arguments: dict[str, Any], exact_mixtral: Any) -> None:
    arguments = {"do_sample": False, "max_new_tokens": 16} | arguments
    ours, theirs = both(exact_mixtral, torch.tensor([prompt_of(9)]), **arguments)
    assert ours.tolist() == theirs.tolist()


def test_sampled_tokens_come_of_the_seed(mixtral: Any) -> None:
    def sample(seed: int) -> list[int]:
        torch.manual_seed(seed)
        tokens: list[int] = mixtral.generate(
            torch.tensor([prompt_of(9)]),
            do_sample=True,
            max_new_tokens=16,
            pad_token_id=0,
            custom_generate=Decoding(),
        )[0].tolist()
        return tokens

    assert sample(1) == sample(1)
    assert sample(1) != sample(2)


@pytest.mark.parametrize(
    "arguments",
    [
        {"num_return_sequences": 2, "do_sample": True},
        {"num_beams": 3, "do_sample": False},
        {"return_dict_in_generate": True, "output_scores": True, "do_sample": False},
        {"use_cache": False, "do_sample": False},
        {"cache_implementation": "static", "do_sample": False},
        {"prefill_chunk_size": 4, "do_sample": False},
    ],
    ids=str,
)
def test_what_is_not_plain_goes_to_transformers(arguments: dict[str, Any], mixtral: Any) -> None:
    ids = torch.tensor([prompt_of(9)])
    with mock.patch.object(Decoding, "_decode", side_effect=AssertionError):
        ours, theirs = both(mixtral, ids, max_new_tokens=6, **arguments)
    if arguments.get("return_dict_in_generate"):
        ours, theirs = ours.sequences, theirs.sequences
    assert ours.tolist() == theirs.tolist()


@pytest.mark.parametrize("padded", [True, False])
def test_batches_and_padding_go_to_transformers(padded: bool, mixtral: Any) -> None:
    ids = torch.tensor([prompt_of(9)] if padded else [prompt_of(9), prompt_of(9, seed=1)])
    mask = torch.ones_like(ids)
    if padded:
        mask[0, :3] = 0
    with mock.patch.object(Decoding, "_decode", side_effect=AssertionError):
        ours, theirs = both(mixtral, ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    assert ours.tolist() == theirs.tolist()


def test_a_model_without_a_worker_goes_to_transformers(stock: Make) -> None:
    ids = torch.tensor([prompt_of(9)])
    ours, theirs = both(stock("mixtral"), ids, max_new_tokens=6, do_sample=False)
    assert ours.tolist() == theirs.tolist()


def test_a_processor_that_fails(mixtral: Any) -> None:
    with pytest.raises(ZeroDivisionError, match="of a processor"):
        mixtral.generate(
            torch.tensor([prompt_of(9)]),
            max_new_tokens=4,
            pad_token_id=0,
            logits_processor=[Broken()],
            custom_generate=Decoding(),
        )


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
        Worker(attach("m", daemon.socket), dtype=torch.float32, say=lambda _: None) as worker,
    ):
        result = generate(worker, prompt, GenerationSettings(max_new_tokens=40)).result
    stock = AutoModelForCausalLM.from_pretrained(long_rope, dtype=torch.float32)
    ids = byte_tokenizer()(prompt).input_ids
    assert result.tokens == greedy(stock, ids, 40)
    assert result.executor == "modules"


@pytest.mark.parametrize("sample", [True, False])
@pytest.mark.parametrize("arguments", [{}, {"use_cache": False}], ids=str)
def test_scores_that_are_no_numbers(arguments: Any, sample: bool, mixtral: Any) -> None:
    ids = torch.tensor([prompt_of(9)])
    healthy = mixtral.lm_head.weight.data[7].clone()
    mixtral.lm_head.weight.data[7] = torch.nan
    try:
        with pytest.raises(PreconditionError, match=r"not finite.*in bfloat16.*--dtype float32"):
            mixtral.generate(
                ids,
                custom_generate=Decoding(),
                do_sample=sample,
                max_new_tokens=3,
                pad_token_id=0,
                **arguments,
            )
    finally:
        mixtral.lm_head.weight.data[7] = healthy


def test_the_streamer_gets_every_token(mixtral: Any) -> None:
    recorder = Recorder()
    out = mixtral.generate(
        torch.tensor([prompt_of(5)]),
        max_new_tokens=4,
        do_sample=False,
        streamer=recorder,
        custom_generate=Decoding(recorder),
        pad_token_id=0,
    )
    assert recorder.pieces == [out[0, :5].tolist(), *([token] for token in out[0, 5:].tolist())]
    assert recorder.ended == 1


def test_an_interrupt_leaves_the_loop(mixtral: Any) -> None:
    recorder = Recorder(stop_after=3)
    with pytest.raises(KeyboardInterrupt):
        mixtral.generate(
            torch.tensor([prompt_of(5)]),
            max_new_tokens=50,
            streamer=recorder,
            custom_generate=Decoding(recorder),
            pad_token_id=0,
        )
    assert len(recorder.pieces) == 4, "the prompt and three tokens"
