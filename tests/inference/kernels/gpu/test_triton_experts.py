"""The GPU's MoE layer against the reference: under Triton's interpreter where no GPU is."""

import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from expertd_inference.kernels.activation import Activation, ActivationKind
from expertd_inference.kernels.wave import CachedWave, Routed
from expertd_testing.forms import named
from expertstore.pack.layout import Matrix
from tests.inference.kernels.gpu.cached_layer import CachedLayer, routed
from tests.inference.kernels.gpu.gpu import DEVICE

triton_experts = pytest.importorskip("expertd_inference.kernels.gpu.triton_experts")
fill_slots_cached, aligned = triton_experts.fill_slots_cached, triton_experts.aligned

FEW, MANY = 2, 9  # tokens: a product per pair, and tiles

ATOL = {
    # Sums of at most 256 products in another order.
    torch.float32: 3e-6,
    # Results round to 11 or 8 bits four times, and to a neighbour where the order of sums or a
    # weight that the reference rounds and a GEMV does not tips the scale: two units at most of
    # the largest, as a share of it.
    torch.float16: 2**-9,
    torch.bfloat16: 2**-6,
}


def matrices(
    precision: str, hidden: int, inner: int, *, gated: bool = True
) -> tuple[Matrix, Matrix]:
    inward = ("gate_up", 2 * inner) if gated else ("up", inner)
    return named(precision, *inward, hidden), named(precision, "down", hidden, inner)


def run(layer: CachedLayer, tokens: int, k: int | None = None) -> tuple[Tensor, Tensor]:
    """What the kernels and the reference make of random tokens."""
    # The interpreter takes its time for each pair.
    k = k or (1 if tokens == FEW else 2)
    dtype = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}[layer.dtype]
    generator = torch.Generator().manual_seed(3)
    hidden = torch.randn(tokens, layer.hidden, generator=generator).to(DEVICE, dtype)
    index, weights = routed(tokens, k, layer.num_experts, DEVICE)
    slots = torch.full((tokens, k, layer.hidden), 7.0, device=DEVICE)
    held = [e for e, slot in enumerate(layer.slot_of.tolist()) if slot >= 0]
    expected = layer.expected(slots, hidden, index, weights, held)
    fill_slots_cached(slots, Routed(hidden, index, weights), layer.wave)
    return slots.cpu(), expected


def assert_close(found: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    largest = expected[expected != 7].abs().max().item()
    torch.testing.assert_close(found, expected, atol=ATOL[dtype] * max(1, largest), rtol=0)


@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize(
    ("precision", "dtype"),
    [
        *((name, torch.bfloat16) for name in ("16", "8g64", "8g16", "4g64", "4g16m", "mxfp4")),
        *((name, torch.bfloat16) for name in ("3g64", "3g32m", "2g16", "2g16m")),
        *((name, torch.bfloat16) for name in ("nvfp4",)),
        *((name, torch.float16) for name in ("16", "4g64", "mxfp4")),
    ],
)
def test_every_scheme(precision: str, dtype: torch.dtype, tokens: int) -> None:
    layer = CachedLayer(matrices(precision, 128, 64), dtype=dtype, device=DEVICE)
    found, expected = run(layer, tokens)
    assert_close(found, expected, dtype)


@pytest.mark.parametrize("precision", ["4g64", "2g16m", "int4g32"])
@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["few", "many"])
def test_scales_in_bfloat16(tokens: int, precision: str) -> None:
    layer = CachedLayer(
        matrices(precision, 128, 64), dtype=torch.float32, device=DEVICE, scales="BF16"
    )
    found, expected = run(layer, tokens)
    assert_close(found, expected, torch.float32)


@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["few", "many"])
@pytest.mark.parametrize(
    ("precision", "hidden", "inner"),
    [
        ("16", 37, 21),  # nothing divides, rows are not aligned to anything
        ("8g128", 128, 128),  # a single group a row
        ("8g32", 96, 32),  # three groups a row; as many units as a step has, or fewer
        ("4g64", 576, 64),  # spans that no power of two divides: the last step is part full
        ("4g16m", 256, 80),  # meta groups that end inside a row
        ("3g64", 64, 64),  # eight rows to a unit, fewer units than a block takes
        ("2g16", 48, 16),  # one group a row
        ("mxfp4", 96, 160),
        ("nvfp4", 48, 80),
        ("mxfp8", 96, 32),
        ("fp8:24x32", 80, 48),  # blocks that are smaller at both edges
        ("fp8:1x4096", 48, 32),  # a scale for a row
        ("int8g16", 48, 16),
    ],
)
def test_odd_shapes(precision: str, hidden: int, inner: int, tokens: int) -> None:
    # In float32 nothing hides behind rounding.
    layer = CachedLayer(matrices(precision, hidden, inner), dtype=torch.float32, device=DEVICE)
    found, expected = run(layer, tokens)
    assert_close(found, expected, torch.float32)


@pytest.mark.parametrize(("precision", "hidden"), [("fp8:32x24", 48), ("fp8:1x4096", 40)])
def test_columns_that_no_load_divides_are_refused(precision: str, hidden: int) -> None:
    layer = CachedLayer(matrices(precision, hidden, 32), device=DEVICE)
    with pytest.raises(
        ValueError, match=f"gate_up has {hidden} columns, and a scale for .* of them"
    ):
        run(layer, FEW)


@pytest.mark.parametrize(
    ("kind", "tokens"),
    [
        *((kind, FEW) for kind in ActivationKind),
        *((kind, MANY) for kind in (ActivationKind.GPT_OSS, ActivationKind.RELU2)),
    ],
)
def test_every_activation(kind: ActivationKind, tokens: int) -> None:
    # A limit that about half of the values reach.
    activation = (
        Activation(kind, 1.702, 0.7) if kind is ActivationKind.GPT_OSS else Activation(kind)
    )
    layer = CachedLayer(
        matrices("8g32", 64, 32, gated=kind is not ActivationKind.RELU2),
        bias=True,
        activation=activation,
        dtype=torch.float32,
        device=DEVICE,
    )
    found, expected = run(layer, tokens)
    assert_close(found, expected, torch.float32)


@pytest.mark.parametrize("precision", ["16", "2g16m"])
def test_without_a_gate(precision: str) -> None:
    """In units of one row and of four; 40 is no multiple of two blocks' rows."""
    activation = Activation(ActivationKind.RELU2)
    chosen = matrices(precision, 48, 40 if precision == "16" else 48, gated=False)
    layer = CachedLayer(chosen, activation=activation, dtype=torch.float32, device=DEVICE)
    for tokens in (FEW, MANY):
        found, expected = run(layer, tokens)
        assert_close(found, expected, torch.float32)


@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["few", "many"])
def test_values_round_where_the_reference_rounds(tokens: int) -> None:
    # Plain weights in the activations' dtype and sums of so few products that float32 has them
    # all but exactly: where a rounding point is another, a tenth of the results and more differ.
    activation = Activation(ActivationKind.GPT_OSS, 1.702, 0.7)
    layer = CachedLayer(matrices("16", 16, 8), bias=True, activation=activation, device=DEVICE)
    found, expected = run(layer, tokens)
    different = (found != expected).float().mean().item()
    # The CPU's own exponential may round a sigmoid to the other neighbour.
    assert different < 0.02


@pytest.mark.parametrize(
    "precision",
    [
        *("16", "8g64", "4g64", "4g16m", "3g64", "3g32m", "2g16", "2g16m"),
        *("mxfp4", "nvfp4", "fp8:32x64"),
    ],
)
def test_a_token_alone_is_what_it_is_among_many(precision: str) -> None:
    # A product per pair and tiles multiply with the same weights: only where the order of float32
    # sums tips a scale are results neighbours, one in fifty here, and as many again where that
    # was the input of the second matrix. With weights that one of them rounds, a third differ.
    layer = CachedLayer(matrices(precision, 128, 64), device=DEVICE)
    hidden = torch.randn(MANY, 128, generator=torch.Generator().manual_seed(3)).bfloat16()
    index, weights = routed(MANY, 1, layer.num_experts)
    results = []
    for tokens in (FEW, MANY):
        slots = torch.zeros(tokens, 1, 128, device=DEVICE)
        fill_slots_cached(
            slots,
            Routed(*(each[:tokens].to(DEVICE) for each in (hidden, index, weights))),
            layer.wave,
        )
        results.append(slots[:FEW])
    assert (results[0] != results[1]).float().mean().item() < 0.08


@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["few", "many"])
def test_the_cache_s_state_changes_no_bit(tokens: int) -> None:
    layer = CachedLayer(matrices("4g32", 64, 32), num_experts=5, device=DEVICE)
    whole, _ = run(layer, tokens, 3)
    index, _ = routed(tokens, 3, 5)
    layer.hold({4: 0, 2: 6, 0: 3})
    part, expected = run(layer, tokens, 3)
    held = torch.isin(index, torch.tensor([0, 2, 4]))
    assert torch.equal(part[held], whole[held])
    # Those that are not there are left alone.
    assert (part[~held] == 7).all()
    assert_close(part, expected, torch.bfloat16)


@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["few", "many"])
def test_choices_that_name_no_expert_are_left_alone(tokens: int) -> None:
    layer = CachedLayer(matrices("8g32", 32, 32), device=DEVICE)
    hidden = torch.randn(tokens, 32, device=DEVICE, dtype=torch.bfloat16)
    index = torch.full((tokens, 2), layer.num_experts, device=DEVICE)
    index[0, 1] = -1
    slots = torch.full((tokens, 2, 32), 7.0, device=DEVICE)
    weights = torch.ones(tokens, 2, device=DEVICE)
    fill_slots_cached(slots, Routed(hidden, index, weights), layer.wave)
    assert (slots == 7).all()


def test_an_expert_may_take_all_tokens() -> None:
    # More tiles of one expert than the average asks for, and none of the others.
    layer = CachedLayer(matrices("8g32", 32, 32), num_experts=64, device=DEVICE)
    hidden = torch.randn(40, 32, dtype=torch.bfloat16)
    index = torch.full((40, 1), 63)
    weights = torch.ones(40, 1)
    slots = torch.zeros(40, 1, 32, device=DEVICE)
    fill_slots_cached(
        slots, Routed(hidden.to(DEVICE), index.to(DEVICE), weights.to(DEVICE)), layer.wave
    )
    expected = layer.expected(torch.zeros(40, 1, 32), hidden, index, weights, [63])
    assert_close(slots.cpu(), expected, torch.bfloat16)


def test_bits_of_a_row_of_an_exact_wave(monkeypatch: pytest.MonkeyPatch) -> None:
    layer = CachedLayer(matrices("4g32", 64, 32), device=DEVICE)
    hidden = torch.randn(MANY, 64, device=DEVICE, dtype=torch.bfloat16)
    index, weights = routed(MANY, 2, layer.num_experts, DEVICE)
    wave = replace(layer.wave, exact=True)
    together, alone, parts = torch.zeros(3, MANY, 2, 64, device=DEVICE)
    fill_slots_cached(together, Routed(hidden, index, weights), wave)
    for at in range(MANY):
        one = slice(at, at + 1)
        fill_slots_cached(alone[one], Routed(hidden[one], index[one], weights[one]), wave)
    assert torch.equal(together, alone)
    # A grid of CUDA's has no more pairs than this.
    monkeypatch.setattr(triton_experts, "MAX_GEMV_PAIRS", 7)
    fill_slots_cached(parts, Routed(hidden, index, weights), wave)
    assert torch.equal(together, parts)


@pytest.mark.parametrize("tokens", [FEW, MANY], ids=["few", "many"])
def test_nan_stays_with_its_token(tokens: int) -> None:
    layer = CachedLayer(matrices("4g32", 32, 32), device=DEVICE)
    hidden = torch.randn(tokens, 32, device=DEVICE, dtype=torch.bfloat16)
    hidden[1, 5] = math.nan
    index, weights = routed(tokens, 2, layer.num_experts, DEVICE)
    slots = torch.zeros(tokens, 2, 32, device=DEVICE)
    fill_slots_cached(slots, Routed(hidden, index, weights), layer.wave)
    nan = slots.isnan()
    assert nan[1].all()
    assert nan.sum() == nan[1].sum()


def test_results_are_kept_in_the_slots_dtype() -> None:
    layer = CachedLayer(matrices("8g32", 32, 32), device=DEVICE)
    hidden = torch.randn(3, 32, device=DEVICE, dtype=torch.bfloat16)
    index, weights = routed(3, 2, layer.num_experts, DEVICE)
    slots = torch.zeros(3, 2, 32, device=DEVICE, dtype=torch.bfloat16)
    weights = weights.bfloat16()
    expected = layer.expected(slots, hidden, index, weights, range(4))
    fill_slots_cached(slots, Routed(hidden, index, weights), layer.wave)
    assert_close(slots.cpu(), expected, torch.bfloat16)


def test_an_address_that_four_values_do_not_divide() -> None:
    layer = CachedLayer(matrices("8g32", 32, 32), device=DEVICE)
    memory = torch.randn(65, device=DEVICE, dtype=torch.bfloat16)
    index, weights = routed(2, 1, layer.num_experts, DEVICE)
    slots = torch.zeros(2, 2, 1, 32, device=DEVICE)
    for out, hidden in zip(
        slots, (memory[1:].view(2, 32), memory[1:].clone().view(2, 32)), strict=True
    ):
        fill_slots_cached(out, Routed(hidden, index, weights), layer.wave)
    assert torch.equal(slots[0], slots[1])
    # Only a GPU minds such an address.
    moved = aligned(memory[1:].view(2, 32))
    assert moved.data_ptr() % 16 == 0
    assert torch.equal(moved, memory[1:].view(2, 32))


def test_no_tokens() -> None:
    layer = CachedLayer(matrices("8g32", 32, 32), device=DEVICE)
    nothing = torch.zeros(0, 2, device=DEVICE)
    fill_slots_cached(
        torch.zeros(0, 2, 32, device=DEVICE),
        Routed(torch.zeros(0, 32, device=DEVICE, dtype=torch.bfloat16), nothing.long(), nothing),
        layer.wave,
    )


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"slots": torch.zeros(2, 3, 32)}, "slots are"),
        ({"weights": torch.zeros(3, 2)}, "routing"),
        ({"index": torch.zeros(2, 2)}, "numbered in"),
        ({"hidden": torch.zeros(2, 32, dtype=torch.float64)}, "no GPU kernel"),
        ({"cache": torch.zeros(2, 64, dtype=torch.uint8)}, "cannot hold records"),
        ({"slot_of": torch.zeros(4, dtype=torch.int64)}, "int32"),
    ],
)
def test_what_does_not_fit_is_refused(change: dict[str, Tensor], what: str) -> None:
    layer = CachedLayer(matrices("8g32", 32, 32))
    given = {
        "slots": torch.zeros(2, 2, 32),
        "hidden": torch.zeros(2, 32),
        "index": torch.zeros(2, 2, dtype=torch.int64),
        "weights": torch.zeros(2, 2),
        "cache": layer.cache.cpu(),
        "slot_of": layer.slot_of.cpu(),
    } | change
    with pytest.raises(ValueError, match=what):
        fill_slots_cached(
            given["slots"],
            Routed(given["hidden"], given["index"], given["weights"]),
            CachedWave(given["cache"], given["slot_of"], layer.spec),
        )
