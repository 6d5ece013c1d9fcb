"""The gated delta rule's step is that of transformers' own functions, for any places of states."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.kimi_linear.modeling_kimi_linear import recurrent_kimi_delta_attention
from transformers.models.qwen3_next.modeling_qwen3_next import torch_recurrent_gated_delta_rule

from expertd_inference.kernels.cpu.delta import Places, delta_step
from expertd_inference.kernels.cpu.library import native_library
from expertd_inference.kernels.cpu.native import use_isa

ISAS = [
    name
    for name in ("portable", "avx2", "avx512")
    if native_library().library is not None and use_isa(name) is not None
]
pytestmark = pytest.mark.skipif(not ISAS, reason="no native library")
ERRORS = {torch.float32: 1e-5, torch.bfloat16: 1e-2}
"""The result is rounded to its dtype; all else is float32 in another order."""
SHAPES = [
    (4, 2, 16, 96),  # heads share keys; columns for four registers at once and for one
    (3, 3, 5, 7),  # neither keys nor columns fill a register
    (2, 1, 128, 128),  # as Qwen3-Next has them
]


@pytest.fixture(autouse=True)
def best_isa() -> Iterator[None]:
    yield
    use_isa(None)


def rows(shape: tuple[int, ...], num: int, dtype: torch.dtype, *, by_key: bool) -> tuple[Any, ...]:
    """States of 2 * ``num`` places, and query, key, value, decay, beta of ``num`` sequences."""
    heads, key_heads, keys, values = shape
    torch.manual_seed(0)
    states = torch.randn(2 * num, heads, keys, values)
    query, key = torch.randn(2, num, key_heads, keys).to(dtype)
    value = torch.randn(num, heads, values).to(dtype)
    decay = -torch.rand(num, heads, keys) if by_key else -torch.rand(num, heads)
    return states, query, key, value, decay, torch.rand(num, heads).to(dtype)


def theirs(state: Tensor, *parts: Tensor) -> tuple[Tensor, Tensor]:
    query, key, value, decay, beta = (part.unsqueeze(1) for part in parts)
    own: Any = torch_recurrent_gated_delta_rule
    if decay.dim() == value.dim():  # a decay for each key
        own = recurrent_kimi_delta_attention
    options = {"output_final_state": True, "use_qk_l2norm_in_kernel": True}
    out, state = own(query, key, value, g=decay, beta=beta, initial_state=state, **options)
    return out[:, 0], state


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", list(ERRORS))
@pytest.mark.parametrize("by_key", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
def test_a_step(shape: tuple[int, ...], by_key: bool, dtype: torch.dtype, isa: str) -> None:
    if by_key:
        shape = (shape[0], shape[0], *shape[2:])
    states, *parts = rows(shape, 3, dtype, by_key=by_key)
    before, after = [4, 0, 3], [5, 0, 1]  # the second in place
    expected, new = theirs(states[before], *parts)
    untouched = states[[2, 3, 4]].clone()
    use_isa(isa)
    out = delta_step(states, Places(before, after), *parts)
    assert out.dtype is dtype
    torch.testing.assert_close(out, expected, rtol=ERRORS[dtype], atol=ERRORS[dtype])
    torch.testing.assert_close(states[after], new, rtol=1e-5, atol=1e-5)
    assert torch.equal(states[[2, 3, 4]], untouched)


def test_bits_depend_on_no_other_sequence_and_no_thread() -> None:
    states, *parts = rows((4, 2, 128, 128), 5, torch.bfloat16, by_key=False)
    both = delta_step(states, Places(range(5), range(5, 10)), *parts)
    together = states[5:].clone()
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for n in range(5):
            alone = delta_step(states, Places([n], [9 - n]), *(part[n : n + 1] for part in parts))
            assert torch.equal(alone[0], both[n])
            assert torch.equal(states[9 - n], together[n])
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("number", "wrong", "why"),
    [
        (0, torch.zeros(6, 2, 4, 4, dtype=torch.bfloat16), "are not known"),
        (0, torch.zeros(6, 2, 4, 600), "are not known"),
        (0, torch.zeros(4, 2, 4, 4), "places do not fit"),
        (0, torch.zeros(6, 2, 4, 8), "do not fit values"),
        (1, torch.zeros(3, 2, 4, dtype=torch.bfloat16), "several dtypes"),
        (4, torch.zeros(3, 2, 5), "do not fit values"),
        (5, torch.zeros(3, 1), "do not fit values"),
    ],
)
def test_what_does_not_fit_is_refused(number: int, wrong: Tensor, why: str) -> None:
    arguments = list(rows((2, 2, 4, 4), 3, torch.float32, by_key=False))
    arguments[number] = wrong
    states, *parts = arguments
    with pytest.raises(ValueError, match=why):
        delta_step(states, Places([0, 1, 2], [3, 4, 5]), *parts)
