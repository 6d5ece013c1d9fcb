"""Blocks of keys and values take memory only where they are used, and give it back."""

import resource
from pathlib import Path

import pytest
import torch

from expertd_inference.kernels.blocks import BLOCK_TOKENS
from expertd_inference.kv.memory import KvLayer, KvMemory, bytes_per_block
from expertstore.errors import CapacityError, InvalidInputError

LAYERS = [KvLayer(2, 8, 6), KvLayer(1, 16, 4)]


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


def test_layers_have_their_own_form_and_do_not_meet() -> None:
    with KvMemory(LAYERS, 3, torch.bfloat16) as memory:
        assert [tuple(t.shape) for t in memory.keys] == [(3, 2, 64, 8), (3, 1, 64, 16)]
        assert [tuple(t.shape) for t in memory.values] == [(3, 2, 64, 6), (3, 1, 64, 4)]
        tensors = [*memory.keys, *memory.values]
        for number, tensor in enumerate(tensors):
            assert tensor.is_contiguous()
            assert tensor.dtype == torch.bfloat16
            tensor.fill_(number)
        for number, tensor in enumerate(tensors):
            assert (tensor == number).all()
        assert memory.num_bytes == sum(t.numel() * 2 for t in tensors)
        assert memory.num_bytes == 3 * bytes_per_block(LAYERS, torch.bfloat16)
    memory.close()
    assert memory.keys == memory.values == []


def test_a_block_is_copied_in_all_layers() -> None:
    with KvMemory(LAYERS, 3, torch.bfloat16) as memory:
        tensors = [*memory.keys, *memory.values]
        for number, tensor in enumerate(tensors):
            tensor.zero_()
            tensor[2] = number + 1
        memory.copy_block(2, 0)
        for number, tensor in enumerate(tensors):
            assert (tensor[0] == number + 1).all()
            assert not tensor[1].any()


def test_memory_is_taken_by_what_is_written_and_given_back() -> None:
    layer = KvLayer(8, 64, 64)
    num_blocks = (64 << 30) // bytes_per_block([layer], torch.float32)
    before = resident_bytes()
    memory = KvMemory([layer], num_blocks, torch.float32)
    assert resident_bytes() - before < 32 << 20
    kept = memory.keys[0]
    blocks = (64 << 20) // (kept[0].numel() * 4)
    kept[:blocks] = 1.0
    used = resident_bytes() - before
    assert 64 << 20 <= used < 96 << 20
    memory.close()
    assert resident_bytes() - before < 32 << 20
    assert kept[0, 0, 0, 0] == 0  # still there, to be read without harm


@pytest.mark.parametrize("num_blocks", [0, -1])
def test_no_blocks(num_blocks: int) -> None:
    with pytest.raises(InvalidInputError, match="ask for 1 or more"):
        KvMemory(LAYERS, num_blocks, torch.float32)


def test_a_layer_of_nothing() -> None:
    with pytest.raises(InvalidInputError, match="no size"):
        KvMemory([KvLayer(0, 8, 8)], 1, torch.float32)


@pytest.mark.parametrize("num_blocks", [1 << 40, 1 << 70])
def test_more_than_can_be_mapped(num_blocks: int) -> None:
    with pytest.raises(CapacityError, match="ask for fewer") as raised:
        KvMemory(LAYERS, num_blocks, torch.float32)
    assert raised.value.requested == num_blocks * bytes_per_block(LAYERS, torch.float32)


def test_a_model_without_attention() -> None:
    with KvMemory([], 4, torch.float32) as memory:
        assert memory.num_bytes == 0
    assert BLOCK_TOKENS == 64  # what the native code has
