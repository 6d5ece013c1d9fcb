"""How keys and values lie in their blocks.

On the CPU they lie as native/attention.h reads them, in words of 4 bytes. A word of keys is a
float32, or two columns of 16 bits, of one token; the words of 32 tokens lie beside each other. A
word of values is a float32, or two tokens of 16 bits, of one column; the words of 32 columns lie
beside each other, or those of all columns if 32 does not divide them. So a layer's blocks are
[num_blocks, kv_heads, 64, width] in size only, and are reached by the functions here. On other
devices they lie in the order of their shape.
"""

from torch import Tensor

from expertd_inference.kernels.blocks import BLOCK_TOKENS

_BESIDE = 32
_WORD_BYTES = 4


def put_keys(keys: Tensor, block: Tensor, offset: Tensor, key: Tensor) -> None:
    """Puts ``key`` [rows, kv_heads, key_width] at ``offset`` [rows] of ``block`` [rows]."""
    if keys.device.type != "cpu":
        keys[block, :, offset] = key
        return
    words = _key_words(keys)
    words[block, :, offset // _BESIDE, :, offset % _BESIDE] = _split(key, words.shape[5])


def put_values(values: Tensor, block: Tensor, offset: Tensor, value: Tensor) -> None:
    """Puts ``value`` [rows, kv_heads, value_width] at ``offset`` [rows] of ``block`` [rows]."""
    if values.device.type != "cpu":
        values[block, :, offset] = value
        return
    words = _value_words(values)
    tokens = words.shape[5]
    words[block, :, :, offset // tokens, :, offset % tokens] = _split(value, words.shape[4])


def take_keys(keys: Tensor, blocks: Tensor) -> Tensor:
    """A copy of ``blocks`` [n]: [n, kv_heads, 64, key_width], in the order of its shape."""
    found = keys.index_select(0, blocks)
    if keys.device.type != "cpu":
        return found
    return _key_words(found).transpose(3, 4).reshape(found.shape)


def take_values(values: Tensor, blocks: Tensor) -> Tensor:
    """A copy of ``blocks`` [n]: [n, kv_heads, 64, value_width], in the order of its shape."""
    found = values.index_select(0, blocks)
    if values.device.type != "cpu":
        return found
    return _value_words(found).permute(0, 1, 3, 5, 2, 4).reshape(found.shape)


def _split(rows: Tensor, size: int) -> Tensor:  # [rows, kv_heads, width / size, size]
    return rows.unflatten(2, (-1, size))  # type: ignore[no-any-return, no-untyped-call]


def _key_words(keys: Tensor) -> Tensor:  # [num_blocks, kv_heads, groups, words, 32, columns]
    columns = _WORD_BYTES // keys.itemsize
    groups, words = BLOCK_TOKENS // _BESIDE, keys.shape[3] // columns
    return keys.view(*keys.shape[:2], groups, words, _BESIDE, columns)


def _value_words(values: Tensor) -> Tensor:  # [num_blocks, kv_heads, groups, words, 32, tokens]
    tokens, width = _WORD_BYTES // values.itemsize, values.shape[3]
    beside = width if width % _BESIDE else _BESIDE
    words = BLOCK_TOKENS // tokens
    return values.view(*values.shape[:2], width // beside, words, beside, tokens)
