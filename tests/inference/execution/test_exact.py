"""With ``exact`` the bits of a sequence's logits do not depend on what else is computed."""

import dataclasses
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from expertd_inference.execution import check
from expertd_inference.execution.batch import Batch
from expertd_inference.execution.choose import choose_executor, choose_for
from expertd_inference.execution.exact import make_exact
from expertd_inference.execution.layers import watch_layers
from expertd_inference.execution.modules import ModulesExecutor
from expertd_inference.execution.room import Room
from expertd_inference.experts.call import seat_of
from expertd_inference.experts.cpu import experts_modules
from expertd_inference.kernels.cpu.linear import LinearKernels, linear_kernels
from expertd_inference.kernels.cpu.native import NativeKernels
from expertd_inference.model.native_linear import use_native_linears
from tests.architectures.batches import ROOM, Texts, batched_model
from tests.architectures.parity import load
from tests.inference.greedy import prompt_of

Make = Callable[..., Any]


@pytest.fixture(scope="module")
def kernels() -> LinearKernels:
    found = linear_kernels(exact=True)
    if found is None:
        pytest.skip("native code is not built here")
    return found


@pytest.mark.parametrize("architecture", ["qwen3_moe", "gpt_oss", "deepseek_v3", "phimoe"])
def test_alone_and_among_others(architecture: str, packed: Make, kernels: LinearKernels) -> None:
    model = load(packed(architecture, "4bit-fast"), torch.bfloat16, NativeKernels(exact=True))
    use_native_linears(model, kernels)
    said: list[str] = []
    executor = choose_for(model, ROOM, said.append, exact=True)
    assert executor.name == "modules"
    assert executor.shares_prefixes == (not said)
    prompts = [prompt_of(length, seed=length) for length in (40, 70, 9)]
    texts = Texts(executor, prompts)
    texts.step({0: 30, 2: 5, 1: 3})
    texts.step({1: 60, 0: 1, 2: 1})
    texts.step({0: 1, 1: 1, 2: 1})
    alone = Texts(executor, prompts)
    for n, rows in ((0, (30, 1, 1)), (1, (3, 60, 1)), (2, (5, 1, 1))):
        for num in rows:
            alone.step({n: num})
    for together, by_itself in zip(texts.logits, alone.logits, strict=True):
        assert torch.equal(together, by_itself)


@pytest.mark.usefixtures("kernels")
def test_experts_of_an_unknown_activation_are_asked_row_by_row(packed: Make) -> None:
    exact = NativeKernels(exact=True)
    model = load(packed("mixtral", "4bit-fast"), torch.float32, exact)
    said: list[str] = []
    worker = SimpleNamespace(
        language=model,
        kernels=exact,
        exact=True,
        device_stats=None,
        session=SimpleNamespace(say=said.append),
    )
    assert "one row at a time" not in choose_executor(worker, ROOM).reason
    for module in experts_modules(model).values():
        seat = seat_of(module)
        seat.spec = dataclasses.replace(seat.spec, activation=None)
    executor = choose_executor(worker, ROOM)
    why = f"experts of {len(experts_modules(model))} layers one row at a time"
    assert why in executor.reason
    assert len(said) == 1
    assert why in said[0]
    assert "without --exact" in said[0]
    prompts = [prompt_of(length, seed=length) for length in (40, 9)]
    together, by_itself = Texts(executor, prompts), Texts(executor, prompts)
    together.step({0: 40, 1: 9})
    by_itself.step({0: 40})
    by_itself.step({1: 8})
    by_itself.step({1: 1})
    for ours, theirs in zip(together.logits, by_itself.logits, strict=True):
        assert torch.equal(ours, theirs)


def test_bits_that_depend_on_others_are_noticed() -> None:
    model = batched_model("mixtral")
    layers = watch_layers(model)
    room = Room(check.NUM_SEQUENCES, check.NUM_SEQUENCES, check.NUM_ROWS)

    class ByRow(ModulesExecutor):
        """Each row of its own, and so always of the same bits."""

        def forward(self, batch: Batch) -> Tensor:
            rows = [
                type(span)(
                    span.sequence, [token], span.position + n, span.blocks, None, span.wanted
                )
                for span in batch.spans
                for n, token in enumerate(span.tokens)
            ]
            return torch.cat([super(ByRow, self).forward(Batch((row,))) for row in rows])

    class Beside(ByRow):
        def forward(self, batch: Batch) -> Tensor:
            return super().forward(batch) + len(batch.spans)

    class Divided(ByRow):
        def forward(self, batch: Batch) -> Tensor:
            return super().forward(batch) * torch.cat(
                [torch.full((span.num_rows, 1), span.num_rows) for span in batch.spans]
            )

    check.check_exact(ByRow(model, layers, room), model)
    with pytest.raises(check.MismatchError, match="the other rows of a step"):
        check.check_exact(Beside(model, layers, room), model)
    with pytest.raises(check.MismatchError, match="how a prompt is divided"):
        check.check_exact(Divided(model, layers, room), model)


def test_sequences_that_cannot_share_a_step_have_each_their_own() -> None:
    model = batched_model("mixtral")
    executor = ModulesExecutor(model, watch_layers(model), ROOM, alone="of something")
    texts = Texts(executor, [[1, 2], [3]])
    assert not executor.fits(Batch(tuple(texts.spans({0: 2, 1: 1}))))
    assert executor.fits(Batch(tuple(texts.spans({0: 2}))))
    assert not executor.shares_prefixes
    assert executor.reason == "its modules compute one sequence at a time, since of something"


def test_a_router_of_torch_is_asked_row_by_row() -> None:
    model = batched_model("deepseek_v3")
    router = model.model.layers[1].mlp.gate
    kind = type(router)
    rows = torch.randn(33, 128, generator=torch.Generator().manual_seed(0))
    expected = [kind.forward(router, row) for row in torch.split(rows, 1)]
    make_exact(model)
    make_exact(model)  # twice is harmless
    asked: list[Tensor] = []
    router.register_forward_hook(lambda _, given, __: asked.append(given[0]))
    for ours, theirs in zip(router(rows), zip(*expected, strict=True), strict=True):
        assert torch.equal(ours, torch.cat(theirs))
    assert asked == [rows], "a hook is called as the model calls the router"
    assert type(router) is kind
