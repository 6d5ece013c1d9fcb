"""Which rows of a sequence come next."""

from expertd_inference.engine.limits import SchedulerLimits
from expertd_inference.engine.sequence import Sequence
from expertd_inference.execution.batch import Span, Wanted
from expertd_inference.kv.pool import BLOCK_TOKENS, num_blocks_of


def decodes(sequence: Sequence, limits: SchedulerLimits) -> bool:
    """Whether its next span is one row after its prompt, rather than a chunk."""
    if limits.replays_rows:
        return sequence.num_computed >= sequence.num_prompt
    return sequence.is_decoding


def chunk_end(sequence: Sequence, limits: SchedulerLimits, num_rows: int, *, first: bool) -> int:
    """Where a chunk ends, as below; it has more rows, or fewer, where an image is to be whole."""
    end = _chunk_end(sequence, limits, num_rows, first=first)
    return end if sequence.seen is None else sequence.seen.cut(sequence.num_computed, end)


def _chunk_end(sequence: Sequence, limits: SchedulerLimits, num_rows: int, *, first: bool) -> int:
    """Where a chunk of at most ``num_rows`` rows ends; where it begins if there is to be none.

    It ends at the prompt's end or at a multiple of a block. Chunks of recurrent layers must end at
    the same places whatever else is computed, and those compute a row of its own in another way,
    so that a last chunk has two rows or more. The ``first`` chunk of a batch may have more rows
    where a prompt is to be whole, or a long text's chunk must end behind the turning point.
    """
    begin = sequence.num_computed
    last = sequence.num_prompt if limits.replays_rows else len(sequence.tokens)
    if limits.whole_prompts:
        return last if first else begin
    behind = begin
    if limits.turning_point is not None and sequence.is_long and begin <= limits.turning_point:
        if not first:
            return begin
        behind = limits.turning_point
        num_rows = max(num_rows, num_blocks_of(behind + 1) * BLOCK_TOKENS - begin)
    if last - begin <= num_rows:
        return last
    end = (begin + num_rows) // BLOCK_TOKENS * BLOCK_TOKENS
    if end <= begin:
        # Too few rows for a block: what there is, but for recurrent layers.
        return begin if limits.replays_rows else begin + num_rows
    if last - end == 1:
        if end - BLOCK_TOKENS > behind:
            return end - BLOCK_TOKENS
        if limits.replays_rows:
            return last
    return end


def span_of(sequence: Sequence, end: int) -> Span:
    """Its rows from where it is to ``end``."""
    begin = sequence.num_computed
    if sequence.settings.prompt_logprobs is not None and not sequence.num_new:
        wanted = Wanted.ALL
    else:
        wanted = Wanted.LAST if end == len(sequence.tokens) else Wanted.NONE
    shift: int | None = 0
    if sequence.seen is not None:
        shift = sequence.seen.shift(begin, end)
    return Span(
        sequence=sequence.id,
        tokens=sequence.tokens[begin:end],
        position=begin,
        blocks=sequence.blocks,
        state=sequence.state,
        wanted=wanted,
        shift=shift or 0,
        seen=sequence.seen if shift is None else None,
        fewer=sequence.settings.fewer_experts,
        adapter=sequence.adapter,
    )
