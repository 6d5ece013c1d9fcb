"""Routers asked ahead of time answer as the model itself does."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from expertd_inference.experts.cpu import experts_modules, layer_numbers
from expertd_inference.experts.keeping import KeptExperts, keeping
from expertd_inference.experts.routers import find_routers
from expertd_inference.fewer_experts import FewerExperts
from expertd_testing.tiny_models import CONFIGS, make_model

EXAMPLE = Path(__file__).parents[3] / "examples/tiny-mixtral"

GROUPS = {"n_group": 4, "topk_group": 2}
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in CONFIGS}
CASES["deepseek_v2 in groups"] = (
    "deepseek_v2",
    {**GROUPS, "topk_method": "group_limited_greedy"},
)
CASES["deepseek_v3 in groups"] = ("deepseek_v3", GROUPS)


class Seen:
    """What entered each layer's experts in one call of a model, and what they were asked for."""

    def __init__(self, model: Any, input_ids: Tensor) -> None:
        named = experts_modules(model)
        self.experts: dict[int, nn.Module] = dict(
            zip(layer_numbers(list(named)), named.values(), strict=True)
        )
        self.hidden: dict[int, Tensor] = {}
        self.chosen: dict[int, Tensor] = {}
        hooks = [
            module.register_forward_pre_hook(self._recorder(layer))
            for layer, module in self.experts.items()
        ]
        with torch.no_grad():
            model(input_ids)
        for hook in hooks:
            hook.remove()

    def _recorder(self, layer: int) -> Any:
        def record(_: nn.Module, arguments: tuple[Tensor, Tensor, Tensor]) -> None:
            self.hidden[layer], self.chosen[layer] = arguments[0].clone(), arguments[1].clone()

        return record


@pytest.mark.parametrize("case", CASES)
def test_every_router_answers_as_in_its_model(case: str) -> None:
    architecture, overrides = CASES[case]
    model = make_model(architecture, **overrides)
    generator = torch.Generator().manual_seed(1)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # so large that it decides
            buffer.copy_(torch.rand(buffer.shape, generator=generator))
    seen = Seen(model, torch.randint(0, 256, (1, 12), generator=generator))
    routers = find_routers(model, seen.experts)
    assert routers.keys() == seen.experts.keys()
    for layer, router in routers.items():
        hidden, chosen = seen.hidden[layer], seen.chosen[layer]
        assert torch.equal(router.chosen(hidden), chosen)
        num_experts = seen.experts[layer].num_experts
        for row in range(len(hidden)):
            mine = chosen[row].unique().tolist()
            everything = router.likeliest(hidden[row : row + 1], 99).tolist()
            assert sorted(everything[: len(mine)]) == mine
            assert sorted(everything) == list(range(num_experts))
            assert sorted(router.likeliest(hidden[row : row + 1], len(mine)).tolist()) == mine
        needed = chosen.unique().tolist()
        assert sorted(router.likeliest(hidden, len(needed)).tolist()) == needed
        assert router.foreseen(hidden) == router.likeliest(hidden, len(needed)).tolist()


def test_asking_ahead_is_not_seen_by_the_model_s_hooks() -> None:
    model = make_model("qwen3_moe")
    seen = Seen(model, torch.zeros(1, 3, dtype=torch.int64))
    calls = []
    block = model.model.layers[1].mlp
    block.gate.register_forward_hook(lambda *arguments: calls.append(arguments))
    find_routers(model, seen.experts)[1].likeliest(seen.hidden[1], 2)
    assert calls == []


def test_nan_gives_experts_that_exist() -> None:
    for architecture in CONFIGS:
        model = make_model(architecture)
        seen = Seen(model, torch.zeros(1, 3, dtype=torch.int64))
        for layer, router in find_routers(model, seen.experts).items():
            hidden = torch.full_like(seen.hidden[layer], torch.nan)
            found = router.likeliest(hidden, 3).tolist()
            assert len(set(found)) == 3
            assert set(found) <= set(range(seen.experts[layer].num_experts))


class _Experts(nn.Module):
    num_experts = 4


class _Block(nn.Module):
    def __init__(self, router: nn.Module) -> None:
        super().__init__()
        self.gate = router
        self.experts = _Experts()


class _TwoInputs(nn.Linear):
    def forward(self, hidden: Tensor, unknown_to_the_block: Tensor) -> Any:
        raise AssertionError


@pytest.mark.parametrize(
    "module",
    [nn.Linear(8, 4), nn.Identity(), _TwoInputs(8, 4)],
    ids=["only logits", "no weight", "wants more than hidden states"],
)
def test_what_is_no_router_is_left_out(module: nn.Module) -> None:
    block = _Block(module)
    assert find_routers(block, {0: block.experts}) == {}


class _Reversed(nn.Linear):
    """As some routers of older transformers: experts, weights, logits."""

    def forward(self, hidden: Tensor) -> Any:
        logits = super().forward(hidden)
        values, chosen = logits.topk(2)
        return chosen, values.softmax(-1), logits


def test_an_answer_in_reverse() -> None:
    block = _Block(_Reversed(8, 4))
    (router,) = find_routers(block, {5: block.experts}).values()
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    expected = block.gate(hidden)[2].argsort(descending=True)
    assert torch.equal(router.chosen(hidden), expected[:, :2])
    assert router.likeliest(hidden[:1], 4).tolist() == expected[0].tolist()


def test_what_rows_will_not_keep_is_not_foreseen() -> None:
    block = _Block(_Reversed(8, 4))
    (router,) = find_routers(block, {5: block.experts}).values()
    hidden = torch.randn(3, 8, generator=torch.Generator().manual_seed(0))
    whole = router.chosen(hidden).tolist()
    kept = KeptExperts([(FewerExperts(1), 2), (None, 1)], torch.device("cpu"))
    with keeping(kept):
        assert router.chosen(hidden).tolist() == [[whole[0][0], 4], [whole[1][0], 4], whole[2]]
        wanted = {whole[0][0], whole[1][0], *whole[2]}
        assert {*router.foreseen(hidden)} == wanted
        assert router.chosen(hidden[:2]).tolist() == whole[:2], "of other rows nothing is known"
    with keeping(KeptExperts([(FewerExperts(1), 1)], torch.device("cpu"))):
        assert router.likeliest(hidden[:1], 3).tolist() == whole[0][:1], "no more than are kept"


def test_the_next_layer_is_foreseen_in_a_trained_model() -> None:
    model = AutoModelForCausalLM.from_pretrained(EXAMPLE)
    text = (EXAMPLE / "heldout.txt").read_text()[:8000]
    ids = torch.tensor([AutoTokenizer.from_pretrained(EXAMPLE)(text).input_ids[:256]])
    seen = Seen(model, ids)
    routers = find_routers(model, seen.experts)
    hits = []
    for layer in list(routers)[1:]:
        foreseen = routers[layer].chosen(seen.hidden[layer - 1])
        real = seen.chosen[layer]
        hits.append((foreseen[:, :, None] == real[:, None, :]).any(-1).float().mean())
    assert torch.stack(hits).mean() > 0.5, "chance is a quarter"
