"""Records read by RPC: put together from their chunks, and verified."""

from collections.abc import Sequence
from dataclasses import dataclass

from xxhash import xxh3_64_intdigest

from expertstore.errors import RecordLostError
from expertstore.v1 import expert_store_pb2 as pb


@dataclass(frozen=True, slots=True)
class Record:
    """One expert's bytes; ``checksum`` is their XXH3-64, as in the pack's manifest."""

    layer: int
    expert: int
    data: bytes
    checksum: str


class RecordAssembler:
    """Makes records of the chunks of one Read, in the order of ``experts``."""

    def __init__(self, experts: Sequence[tuple[int, int]]) -> None:
        self._wanted = list(experts)
        self._num_done = 0
        self._chunks: list[bytes] = []
        self._num_bytes = 0

    def feed(self, chunk: pb.ReadResponse) -> Record | None:
        """The record that ``chunk`` completes, if it does. Raises RecordLostError."""
        expert = (chunk.expert.layer, chunk.expert.expert)
        if self._num_done == len(self._wanted) or expert != self._wanted[self._num_done]:
            raise RecordLostError(
                f"The daemon sent expert {expert[1]} of layer {expert[0]} out of turn; read again.",
                experts=[expert],
            )
        self._num_bytes += len(chunk.data)
        if (
            chunk.offset != self._num_bytes - len(chunk.data)
            or self._num_bytes > chunk.record_bytes
        ):
            raise self._lost("arrived with a gap")
        self._chunks.append(chunk.data)
        if self._num_bytes < chunk.record_bytes:
            return None
        data = b"".join(self._chunks)
        checksum = xxh3_64_intdigest(data)
        if checksum != chunk.checksum:
            raise self._lost("arrived damaged")
        self._num_done += 1
        self._chunks, self._num_bytes = [], 0
        return Record(*expert, data, f"{checksum:016x}")

    def finish(self) -> None:
        """After the last chunk. Raises RecordLostError if a record is missing."""
        if self._num_done < len(self._wanted):
            raise self._lost("did not arrive in full")

    def _lost(self, what: str) -> RecordLostError:
        layer, expert = self._wanted[self._num_done]
        return RecordLostError(
            f"The record of expert {expert} of layer {layer} {what}; read it again.",
            experts=[(layer, expert)],
        )
