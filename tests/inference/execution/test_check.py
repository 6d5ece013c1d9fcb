"""What an executor is refused for when a worker loads."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

from expertd_inference.execution.batch import Batch, Span
from expertd_inference.execution.check import NUM_ROWS, MismatchError, check, check_exact
from expertd_inference.kv.state_memory import StateMemory
from tests.architectures.batches import batched_model, chosen

WIDTH = 16


class Model(nn.Module):
    """Each token's logits depend on all tokens before it."""

    dtype = torch.float32
    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(50, WIDTH)

    def get_input_embeddings(self) -> nn.Module:
        return self.table

    def forward(self, input_ids: Tensor, **_: object) -> Any:
        return SimpleNamespace(logits=self.logits_of(input_ids[0].tolist())[None])

    def logits_of(self, tokens: list[int]) -> Tensor:
        rows: Tensor = self.table(torch.tensor(tokens))
        return torch.stack([rows[: end + 1].sum(0).sin() for end in range(len(rows))])


class Executor:
    """Computes what the model does, and then ``changed`` of it."""

    def __init__(
        self,
        model: Model,
        changed: Callable[[Tensor, Span, Batch], Tensor] = lambda logits, *_: logits,
        *,
        recurrent: bool = False,
        most: int = 99,
    ) -> None:
        self.model, self.changed, self.most = model, changed, most
        self.recurrent, self.shares_prefixes = recurrent, not recurrent
        self.texts: dict[int, list[int]] = {}
        self.batches: list[list[tuple[int, int, int]]] = []

    def fits(self, batch: Batch) -> bool:
        return len(batch.spans) <= self.most

    def forward(self, batch: Batch) -> Tensor:
        assert self.fits(batch)
        assert batch.num_rows <= NUM_ROWS
        self.batches.append([(s.sequence, s.position, s.num_rows) for s in batch.spans])
        return torch.cat([self.span(span, batch) for span in batch.spans])

    def span(self, span: Span, batch: Batch) -> Tensor:
        known = self.texts.get(span.sequence, [])[: span.position]
        assert len(known) == span.position
        self.texts[span.sequence] = [*known, *span.tokens]
        return self.changed(
            self.model.logits_of(self.texts[span.sequence])[span.position :], span, batch
        )


@pytest.fixture(scope="module")
def model() -> Model:
    torch.manual_seed(0)
    return Model()


def checked(executor: Executor) -> None:
    check(cast("Any", executor), executor.model)


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("most", [99, 1])
def test_what_the_model_computes(model: Model, *, recurrent: bool, most: int) -> None:
    executor = Executor(model, recurrent=recurrent, most=most)
    checked(executor)
    # A prompt beside one that decodes, the rest of a prompt, and all that decode.
    spans = [span for batch in executor.batches for span in batch]
    assert {(0, 5, 1), (1, 3, 4), (1, 7, 1)} <= {*spans}
    assert max(map(len, executor.batches)) == (1 if most == 1 else 3 - recurrent)


@pytest.mark.parametrize("recurrent", [False, True])
@pytest.mark.parametrize("where", ["alone", "first of several", "last of several", "later chunk"])
@pytest.mark.parametrize("by", [1.1, 0.0, float("nan")])
def test_what_is_off_somewhere(model: Model, where: str, by: float, *, recurrent: bool) -> None:
    def changed(logits: Tensor, span: Span, batch: Batch) -> Tensor:
        several = len(batch.spans) > 1
        is_there = {
            "alone": span.sequence == 0 and not span.position,
            "first of several": several and span is batch.spans[0],
            "last of several": several and span is batch.spans[-1],
            "later chunk": span.position > 0 and span.num_rows > 1,
        }
        return logits * (by if is_there[where] else 1)

    with pytest.raises(MismatchError, match="its logits are off by "):
        checked(Executor(model, changed, recurrent=recurrent))


def test_as_much_as_other_kernels_round_is_accepted(model: Model) -> None:
    checked(Executor(model, lambda logits, *_: logits * 1.0005))
    with pytest.raises(MismatchError, match=r"off by 0\.002"):
        checked(Executor(model, lambda logits, *_: logits * 1.002))


@pytest.mark.parametrize("recurrent", [False, True])
def test_bits_that_depend_on_nothing_else(model: Model, *, recurrent: bool) -> None:
    executor = Executor(model, recurrent=recurrent)
    check_exact(cast("Any", executor), model)
    # Prompts in other chunks, where those may be, and so many rows that other kernels take them.
    chunks = {num_rows for batch in executor.batches for _, _, num_rows in batch}
    assert (9 in chunks) is not recurrent
    assert max(sum(rows for _, _, rows in batch) for batch in executor.batches) == NUM_ROWS


def test_bits_that_depend_on_neighbours(model: Model) -> None:
    def changed(logits: Tensor, _: Span, batch: Batch) -> Tensor:
        return logits + 1e-6 * (batch.num_rows > 64)

    with pytest.raises(MismatchError, match="the other rows of a step"):
        check_exact(cast("Any", Executor(model, changed)), model)


def test_bits_that_depend_on_the_chunks_of_a_prompt(model: Model) -> None:
    def changed(logits: Tensor, span: Span, _: Batch) -> Tensor:
        return logits + 1e-6 * (span.position == 9)

    with pytest.raises(MismatchError, match="how a prompt is divided"):
        check_exact(cast("Any", Executor(model, changed)), model)
    # Recurrent layers' prompts are never divided otherwise.
    check_exact(cast("Any", Executor(model, changed, recurrent=True)), model)


def test_states_that_are_not_kept_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StateMemory, "scatter", lambda *_: None)
    executor = chosen(batched_model("lfm2_moe"))
    assert executor.name == "turns"
    assert "rows packed together gave something else" in executor.reason


def test_states_of_another_slot_are_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    gather = StateMemory.gather
    monkeypatch.setattr(
        StateMemory,
        "gather",
        lambda self, slots, names: gather(self, [*reversed(slots)], names),
    )
    assert chosen(batched_model("lfm2_moe")).name == "turns"
