"""Which pairs go to which expert: found on the device, in sizes that no routing changes."""

from typing import NamedTuple

import torch
from torch import Tensor


class Tiles(NamedTuple):
    """Pairs ordered by expert, and the tiles that they are cut into."""

    pairs: Tensor  # [T * k]: token * k + position, by expert, then ascending
    slot: Tensor  # [tiles], int32: the cache slot of the tile's expert; -1 for a tile too many
    first: Tensor  # [tiles]: its first pair, an index into pairs
    end: Tensor  # [tiles]: past the last pair of its expert


def route(top_k_index: Tensor, slot_of: Tensor, tile_pairs: int) -> Tiles:
    """Tiles of at most ``tile_pairs`` pairs for all experts that are in a slot.

    ``top_k_index`` [T, k] and ``slot_of`` [num_experts] stay on their device; nothing waits
    for it. There are as many tiles as any routing of so many pairs could need.
    """
    num_experts = slot_of.numel()
    num_pairs = top_k_index.numel()
    expert = top_k_index.flatten().long()
    known = (expert >= 0) & (expert < num_experts)
    slot = slot_of[expert.clamp(0, num_experts - 1)]
    key = torch.where(known & (slot >= 0), expert, num_experts)
    ordered, pairs = torch.sort(key, stable=True)
    bounds = torch.searchsorted(
        ordered, torch.arange(num_experts + 1, device=ordered.device)
    )  # [num_experts + 1], the first pair of each
    first, end = bounds[:-1], bounds[1:]
    num_tiles = (end - first + tile_pairs - 1) // tile_pairs
    tile_end = num_tiles.cumsum(0)
    most = num_pairs // tile_pairs + min(num_experts, num_pairs)
    tile = torch.arange(most, device=ordered.device)
    owner = torch.searchsorted(tile_end, tile, right=True).clamp(max=num_experts - 1)
    return Tiles(
        pairs=pairs,
        slot=torch.where(tile < tile_end[-1], slot_of[owner], -1),
        first=first[owner] + (tile - tile_end[owner] + num_tiles[owner]) * tile_pairs,
        end=end[owner],
    )
