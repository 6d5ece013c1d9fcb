"""How much an engine takes on at a time, and the room that its executor must have for that."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from expertd_inference.engine.limits import SchedulerLimits
from expertd_inference.execution.room import Room
from expertd_inference.fewer_experts import check_fewer
from expertd_inference.field_types import check_types
from expertd_inference.kv.pool import BLOCK_TOKENS, num_blocks_of
from expertd_inference.kv.size import CONTEXT_TOKENS
from expertstore.errors import InvalidInputError
from expertstore.sizes import format_bytes

if TYPE_CHECKING:  # the command checks limits before torch is imported
    from expertd_inference.engine.served import Served
    from expertd_inference.execution.executor import Executor


@dataclass(frozen=True)
class EngineLimits:
    """What bounds an engine's memory and the pauses of its sequences.

    ``max_sequences`` are computed together; ``max_waiting`` more may wait for their turn, and
    what is submitted beyond that is refused. ``kv_tokens`` is how many tokens of all sequences
    together the keys and values have room for; None is what ``max_sequences`` need that fill the
    model's context, but no more than the memory that the worker has for them, which ``num_engines``
    engines share. A step has at most ``chunk_rows`` rows, or one for each sequence and 64 more:
    with more rows prompts are computed faster, and sequences that have begun wait longer for their
    next token. ``experts_per_token`` and ``expert_threshold`` are for sequences whose settings say
    nothing of them (:class:`.GenerationSettings`). Raises InvalidInputError if a value makes no
    sense.
    """

    max_sequences: int = 64
    max_waiting: int = 1024
    kv_tokens: int | None = None
    chunk_rows: int = 512
    num_engines: int = 1
    experts_per_token: int | None = None
    expert_threshold: float | None = None

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("max_sequences", "max_waiting", "chunk_rows", "num_engines"):
            if (value := getattr(self, name)) < 1:
                raise InvalidInputError(f"{name} is {value}; give at least 1.")
        check_fewer(self.experts_per_token, self.expert_threshold)
        if self.kv_tokens is not None and self.kv_tokens < BLOCK_TOKENS:
            raise InvalidInputError(
                f"kv_tokens is {self.kv_tokens}, too few for one sequence; give at least "
                f"{BLOCK_TOKENS}, which is one block."
            )


@dataclass(frozen=True)
class Budget:
    """The room for an engine's sequences, and one phrase that says ``why`` it is as much."""

    room: Room
    why: str


def budget_for(limits: EngineLimits, worker: "Served") -> Budget:
    """What ``limits`` come to for a model with such a context and so much memory.

    Raises InvalidInputError if there is no memory for one block.
    """
    if limits.kv_tokens is not None:
        num_blocks, why = limits.kv_tokens // BLOCK_TOKENS, "as told"
    else:
        longest = worker.context_tokens or CONTEXT_TOKENS
        num_blocks = limits.max_sequences * num_blocks_of(longest)
        why = f"{limits.max_sequences} sequences of {longest} tokens"
        kv_bytes = worker.kv_bytes // limits.num_engines
        affordable = kv_bytes // (BLOCK_TOKENS * worker.kv_bytes_per_token)
        if affordable < num_blocks:
            num_blocks = affordable
            why = f"{format_bytes(kv_bytes)} of memory for keys and values"
        if num_blocks < 1:
            raise InvalidInputError(
                f"There are {why}, and {BLOCK_TOKENS} tokens need "
                f"{format_bytes(BLOCK_TOKENS * worker.kv_bytes_per_token)}: free some memory, or "
                f"say for how many tokens to take it (--kv-tokens {BLOCK_TOKENS})."
            )
    # A row for each sequence, and a block of a prompt beside them.
    num_rows = max(limits.chunk_rows, limits.max_sequences + BLOCK_TOKENS)
    return Budget(Room(num_blocks, limits.max_sequences, num_rows), why)


def scheduler_limits(
    limits: EngineLimits, room: Room, executor: "Executor", worker: "Served"
) -> SchedulerLimits:
    """What a scheduler may plan for such an executor."""
    # What an executor keeps of a sequence beside blocks comes of its tokens in this very order.
    replays = not executor.shares_prefixes
    in_turns = replays and not executor.recurrent
    return SchedulerLimits(
        max_running=room.num_sequences,
        max_rows=room.num_rows,
        max_spans=1 if in_turns else None,
        max_prompts=1 if replays else None,
        mixed=not replays,
        whole_prompts=in_turns,
        replays_rows=replays,
        context_tokens=worker.context_tokens,
        vocabulary=worker.vocabulary,
        experts_per_token=tuple(worker.experts_per_token),
        turning_point=executor.turning_point,
        max_waiting=limits.max_waiting,
    )
