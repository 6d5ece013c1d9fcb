"""The loop of our own gives the tokens of transformers' loop, and leaves it what is not plain."""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from transformers import LogitsProcessor
from transformers.generation.streamers import BaseStreamer

from expertd_inference.decoding import Decoding
from tests.inference.greedy import prompt_of

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
