"""The sum over the top k on a GPU against torch's: interpreted where no GPU is."""

import pytest
import torch

from expertd_inference.kernels import reference
from tests.inference.kernels.gpu import DEVICE

triton_sum = pytest.importorskip("expertd_inference.kernels.triton_sum")


@pytest.mark.parametrize(
    ("tokens", "k", "width"),
    [
        (1, 1, 16),  # nothing to add
        (3, 8, 512),  # exactly one block
        (2, 3, 700),  # a block that is part full
        (0, 2, 16),  # no tokens
    ],
)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("slot_dtype", [torch.float32, torch.bfloat16])
def test_sum(tokens: int, k: int, width: int, dtype: torch.dtype, slot_dtype: torch.dtype) -> None:
    slots = torch.randn(tokens, k, width, generator=torch.Generator().manual_seed(1)).to(slot_dtype)
    found = triton_sum.sum_slots(slots.to(DEVICE), dtype)
    expected = reference.sum_slots(slots, dtype)
    assert found.dtype == dtype
    # Eight numbers may be added in another order, before they are rounded.
    eps = max(torch.finfo(dtype).eps, torch.finfo(slot_dtype).eps)
    torch.testing.assert_close(found.cpu(), expected, atol=4 * eps, rtol=2 * eps)


def test_the_order_is_that_of_the_top_k() -> None:
    # 1 is lost beside 2 ** 25, and is not once that is gone.
    slots = torch.tensor([[2.0**25, 1, -(2.0**25)], [2.0**25, -(2.0**25), 1]], device=DEVICE)
    found = triton_sum.sum_slots(slots[:, :, None].contiguous(), torch.float32)
    assert found.flatten().tolist() == [0, 1]


def test_strided_slots_are_refused() -> None:
    slots = torch.zeros(2, 3, 4, device=DEVICE).transpose(1, 2)
    with pytest.raises(ValueError, match="strided"):
        triton_sum.sum_slots(slots, torch.float32)
