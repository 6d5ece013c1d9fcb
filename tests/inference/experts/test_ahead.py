"""Hints while a layer computes: when they are given, and what they leave."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from expertd_inference import load_model
from expertd_inference.experts.ahead import RouterAhead
from expertd_inference.experts.hints import HintStats, Pair
from expertd_inference.settings import DeviceSettings
from expertd_testing.daemon import serving
from expertstore.errors import UnavailableError
from expertstore.pack.manifest import read_manifest
from tests.inference.greedy import greedy

Make = Callable[..., Any]

EXAMPLE = Path(__file__).parents[3] / "examples/tiny-mixtral"
NUM_EXPERTS = 8
ONE = torch.zeros(1, 4)
CHOSEN = torch.tensor([[0, 1]])
PROMPT, ALL = torch.zeros(4, 4), torch.arange(8).view(4, 2)


@dataclass
class Target:
    """A session of which ``gone`` is absent."""

    gone: set[Pair]
    nvme_misses: int = 0
    sent: list[list[Pair]] = field(default_factory=list)
    needed: list[list[Pair]] = field(default_factory=list)
    looked: int = 0

    def absent(self, experts: Sequence[Pair]) -> list[Pair]:
        return [pair for pair in experts if pair in self.gone]

    def anything_absent(self) -> bool:
        self.looked += 1
        return bool(self.gone)

    def hint(self, experts: Sequence[Pair], needed: Sequence[Pair] = ()) -> None:
        self.sent.append(list(experts))
        self.needed.append(list(needed))


@dataclass
class FixedRouter:
    """Always foresees the same."""

    experts: list[int]
    asked: int = 0
    num_experts: int = 8

    def chosen(self, hidden: Tensor) -> Tensor:
        self.asked += 1
        return torch.tensor([self.experts])

    def likeliest(self, hidden: Tensor, num: int) -> Tensor:
        self.asked += 1
        return torch.tensor(self.experts[:num])

    def foreseen(self, hidden: Tensor) -> list[int]:
        self.asked += 1
        return self.experts


def ahead_of(target: Target, routers: dict[int, Any], **options: Any) -> RouterAhead:
    arguments: dict[str, Any] = {"choices": (1,), "num_experts": 2, "hints_prompts": True}
    return RouterAhead([0, 1, 2], routers, target, **{**arguments, **options})


def test_what_is_absent_of_the_next_layer_is_hinted() -> None:
    target = Target({(1, 3), (1, 5), (2, 2)})
    routers = {layer: FixedRouter([3, 4, 5]) for layer in range(3)}
    ahead = ahead_of(target, routers)
    ahead.begin(0, ONE, CHOSEN, NUM_EXPERTS)
    assert target.sent == [[(1, 3)]]
    target.gone.clear()
    ahead.begin(1, ONE, torch.tensor([[3, 7]]), NUM_EXPERTS)
    ahead.begin(2, ONE, CHOSEN, NUM_EXPERTS)
    assert ahead.stats == HintStats(issued=1, useful=1, layers_ahead=1, why="as told")
    assert target.sent == [[(1, 3)], []], "what is resident is not hinted at"


def test_what_this_layer_lacks_is_said_first_and_for_one_token() -> None:
    chosen = torch.tensor([[6, 2]])
    target = Target({(0, 2), (0, 3), (1, 4)})
    ahead = ahead_of(target, {1: FixedRouter([4])})
    ahead.begin(0, ONE, chosen, NUM_EXPERTS)
    ahead.begin(2, ONE, chosen, NUM_EXPERTS)
    assert target.sent == [[(1, 4)], []]
    assert target.needed == [[(0, 2)], []], "of the chosen, those that are absent"
    target.gone.add((0, NUM_EXPERTS))
    ahead.begin(0, ONE, torch.tensor([[NUM_EXPERTS, 3]]), NUM_EXPERTS)
    assert target.needed[-1] == [(0, 3)], "there is no expert of that number"
    target.gone.discard((0, NUM_EXPERTS))
    target.gone.add((2, 6))
    ahead.begin(2, ONE, chosen, NUM_EXPERTS)
    assert target.needed.pop() == [(2, 6)], "without a hint, too"
    ahead.begin(0, PROMPT, ALL, NUM_EXPERTS)
    assert target.needed.pop() == [], "a prompt's call costs little beside its reads"
    ahead.begin(0, PROMPT[:2], torch.tensor([[6, 2], [3, 2]]), NUM_EXPERTS)
    assert target.needed.pop() == [(0, 2), (0, 3)], "of few rows, too"


def test_several_layers_ahead_and_all_that_a_prompt_wants() -> None:
    target = Target({(layer, expert) for layer in range(3) for expert in range(8)})
    routers = {2: FixedRouter([5, 6, 7]), 1: FixedRouter([1, 2, 3])}
    ahead = ahead_of(target, routers, choices=(2,))
    ahead.begin(0, ONE, CHOSEN, NUM_EXPERTS)
    assert target.sent.pop() == [(1, 1), (1, 2), (2, 5), (2, 6)]
    ahead.begin(0, PROMPT[:3], torch.tensor([[0, 1], [2, 3], [4, 1]]), NUM_EXPERTS)
    guesses = [(1, expert) for expert in (1, 2, 3)] + [(2, expert) for expert in (5, 6, 7)]
    assert target.sent.pop() == guesses, "of few rows all that some of them want"
    ahead.begin(0, PROMPT, torch.tensor([[0, 1], [2, 3], [4, 5], [5, 5]]), NUM_EXPERTS)
    assert target.sent == [[(1, expert) for expert in range(8)]], "a layer in its file's order"


def test_a_prompt_s_experts_are_not_hinted_where_that_does_not_pay() -> None:
    target = Target({(1, expert) for expert in range(8)})
    ahead = ahead_of(target, {1: FixedRouter([1, 2])}, hints_prompts=False)
    ahead.begin(0, PROMPT, ALL, NUM_EXPERTS)
    assert target.sent == []
    ahead.begin(0, ONE, CHOSEN, NUM_EXPERTS)
    assert target.sent == [[(1, 1), (1, 2)]]


def test_it_looks_ahead_as_far_as_tokens_come_fastest() -> None:
    """Only steps of one token count, and only those that some record may have been absent for."""
    clock = [0.0]
    target = Target({(layer, 7) for layer in range(3)})
    routers = {1: FixedRouter([7]), 2: FixedRouter([7])}
    ahead = ahead_of(target, routers, choices=(0, 1, 2), clock=lambda: clock[0])

    def step(tokens: int = 1) -> int:
        for layer in range(3):
            ahead.begin(layer, torch.zeros(tokens, 4), CHOSEN, NUM_EXPERTS)
        return ahead.stats.layers_ahead

    for number in range(80):
        clock[0] += {0: 5.0, 1: 4.0, 2: 3.0}[step()]
        if number % 7 == 0:
            step(9)  # a prompt, whose time and whose follower's are no token's
            clock[0] += 100
    assert ahead.stats.layers_ahead == 2
    assert ahead.stats.why == "a token took 3e+03 ms with 2, 4e+03 ms with 1 and 5e+03 ms with 0"
    target.gone.clear()
    target.nvme_misses += 1
    sent = len(target.sent)
    for _ in range(2000):
        clock[0] += 50.0
        step()
    assert ahead.stats.layers_ahead == 2
    assert len(target.sent) <= sent + 1


def test_nothing_is_asked_while_all_is_resident() -> None:
    target, router = Target(set()), FixedRouter([0, 1])
    ahead = ahead_of(target, {1: router, 2: router})
    for _ in range(3):
        for layer in range(3):
            ahead.begin(layer, ONE, CHOSEN, NUM_EXPERTS)
    assert (router.asked, target.looked, target.sent) == (0, 1, [])
    target.gone, target.nvme_misses = {(1, 0)}, 1
    for layer in range(3):
        ahead.begin(layer, ONE, CHOSEN, NUM_EXPERTS)
    assert router.asked == 2
    assert target.sent == [[(1, 0)], []]


def test_a_session_that_is_over_is_somebody_else_s_to_mend() -> None:
    target = Target({(1, 0)})

    def over() -> bool:
        raise UnavailableError("gone")

    target.anything_absent = over  # type: ignore[method-assign]
    ahead_of(target, {1: FixedRouter([0])}).begin(0, ONE, CHOSEN, NUM_EXPERTS)


def test_a_hint_that_has_had_its_layer_is_taken_back() -> None:
    """What of it was not begun was a wrong guess, or is asked for now."""
    target = Target({(1, 3)})
    ahead = ahead_of(target, {1: FixedRouter([3]), 2: FixedRouter([4])})
    ahead.begin(0, ONE, CHOSEN, NUM_EXPERTS)
    ahead.begin(1, ONE, torch.tensor([[5, 6]]), NUM_EXPERTS)
    ahead.begin(2, ONE, CHOSEN, NUM_EXPERTS)
    assert target.sent == [[(1, 3)], []]
    assert ahead.stats == HintStats(issued=1, wasted=1, layers_ahead=1, why="as told")


@pytest.mark.parametrize("layers", [0, 1, 3, None])
def test_the_same_tokens_with_half_of_the_experts_in_ram(
    layers: int | None, packed: Make, stock: Make
) -> None:
    pack = packed("example")
    text = (EXAMPLE / "heldout.txt").read_text()[4000:6000]
    prompt = AutoTokenizer.from_pretrained(EXAMPLE)(text).input_ids[:40]
    with serving({"m": pack}, ram=read_manifest(pack).manifest.expert_bytes // 2) as daemon:
        device = DeviceSettings(speculate_layers=layers)
        model = load_model("m", socket=daemon.socket, device=device)
        assert greedy(model, prompt, 20) == greedy(stock("example"), prompt, 20)
        stats = model.expertd.hint_stats
        if layers is None:
            assert stats.why == "trying 0, 1 and 2"
        elif layers:
            assert (stats.layers_ahead, stats.why) == (layers, "as told")
            assert stats.issued == stats.useful + stats.late + stats.wasted > 0
            assert stats.useful + stats.late > stats.issued / 4, "as many as by chance"
        else:
            assert stats is None
        model.expertd.close()
