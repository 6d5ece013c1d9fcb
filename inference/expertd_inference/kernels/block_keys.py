"""How keys lie in their blocks.

On the CPU the keys of a block lie as native/attention.h reads them: in groups of 16 tokens, whose
words of 4 bytes (a float32, or two columns of 16 bits) lie beside each other. So a layer's keys are
[num_blocks, kv_heads, 64, key_width] in size only, and are reached by the functions here. Values,
and keys on other devices, lie in the order of their shape.
"""

from torch import Tensor

from expertd_inference.kernels.blocks import BLOCK_TOKENS

_GROUP = 16
_WORD_BYTES = 4


def put_keys(keys: Tensor, block: Tensor, offset: Tensor, key: Tensor) -> None:
    """Puts ``key`` [rows, kv_heads, key_width] at ``offset`` [rows] of ``block`` [rows]."""
    if keys.device.type != "cpu":
        keys[block, :, offset] = key
        return
    words = _words(keys)
    words[block, :, offset // _GROUP, :, offset % _GROUP] = key.unflatten(2, (-1, words.shape[5]))  # type: ignore[no-untyped-call]


def take_keys(keys: Tensor, blocks: Tensor) -> Tensor:
    """A copy of ``blocks`` [n]: [n, kv_heads, 64, key_width], in the order of its shape."""
    found = keys.index_select(0, blocks)
    if keys.device.type != "cpu":
        return found
    return _words(found).transpose(3, 4).reshape(found.shape)


def _words(keys: Tensor) -> Tensor:  # [num_blocks, kv_heads, groups, words, 16, columns]
    columns = _WORD_BYTES // keys.itemsize
    groups, words = BLOCK_TOKENS // _GROUP, keys.shape[3] // columns
    return keys.view(*keys.shape[:2], groups, words, _GROUP, columns)
