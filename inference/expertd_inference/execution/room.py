"""What an engine plans its batches with."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Room:
    """How much an executor must have room for.

    ``num_blocks`` KV blocks, with ids from 0; ``num_sequences`` that are computed at a time, each
    with one of so many slots of recurrent state; ``num_rows`` of one batch.
    """

    num_blocks: int
    num_sequences: int
    num_rows: int
