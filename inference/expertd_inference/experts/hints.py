"""Which layers to foresee while one computes, and what became of the hints.

Plain values: the layers' routers have been asked (:mod:`expertd_inference.experts.routers`), and
the daemon is told elsewhere (:mod:`expertd_inference.experts.ahead`).
"""

from collections.abc import Collection, Iterable, Sequence

import msgspec

Pair = tuple[int, int]
"""A layer and an expert of it."""


MIN_PROMPT_RECORD_BYTES = 512 << 10
"""Of smaller ones the daemon reads a layer's in one batch, neighbours together, in less time than
it takes to read them one by one while a layer computes."""


def pays_for_prompts(record_bytes: int, layer_experts: int, num_records: int) -> bool:
    """Whether to hint at the next layer's experts in a prompt, which uses nearly all of each layer.

    ``layer_experts`` is the largest layer's, ``num_records`` how many the daemon can hold at once:
    without room for two layers what is read for the next is taken from this one, and read twice.
    """
    return record_bytes >= MIN_PROMPT_RECORD_BYTES and 2 * layer_experts <= num_records


class HintStats(msgspec.Struct, frozen=True):
    """What became of the hinted experts, each counted once per visit of its layer.

    ``issued`` is how many were hinted; of those whose layer has come since, ``useful`` were
    needed and in RAM by then, ``late`` were needed and not yet there, ``wasted`` were not needed.
    ``layers_ahead`` is how many layers are foreseen now, 0 while hints do not pay, and ``why``.
    """

    issued: int = 0
    useful: int = 0
    late: int = 0
    wasted: int = 0
    layers_ahead: int = 0
    why: str = ""

    def since(self, before: "HintStats") -> "HintStats":
        """What was counted after ``before``."""
        return HintStats(
            self.issued - before.issued,
            self.useful - before.useful,
            self.late - before.late,
            self.wasted - before.wasted,
            self.layers_ahead,
            self.why,
        )


class HintBook:
    """What was hinted for layers to come."""

    def __init__(self, layers: Iterable[int], num_ahead: int) -> None:
        """``layers`` in a step's order; from each, the ``num_ahead`` that follow are foreseen."""
        order = tuple(layers)
        self._next = {
            layer: order[index + 1 : index + 1 + num_ahead] for index, layer in enumerate(order)
        }
        self._pending: dict[int, set[int]] = {}
        self._issued = self._useful = self._late = self._wasted = 0

    @property
    def stats(self) -> HintStats:
        """All that was counted."""
        return HintStats(self._issued, self._useful, self._late, self._wasted)

    def ahead(self, layer: int) -> Sequence[int]:
        """The layers to foresee while ``layer`` computes, nearest first."""
        return self._next[layer]

    def pending(self, layer: int) -> Collection[int]:
        """The experts that were hinted for ``layer`` since it was last visited."""
        return self._pending.get(layer, ())

    def arrive(self, layer: int, needed: Collection[int], absent: Collection[int]) -> None:
        """``layer`` is about to compute with ``needed``; ``absent`` is of what is pending."""
        for expert in self._pending.pop(layer, ()):
            if expert not in needed:
                self._wasted += 1
            elif expert in absent:
                self._late += 1
            else:
                self._useful += 1

    def issue(self, pairs: Iterable[Pair]) -> None:
        """``pairs`` are hinted. What was hinted before for the same visit counts once."""
        for layer, expert in pairs:
            pending = self._pending.setdefault(layer, set())
            if expert not in pending:
                pending.add(expert)
                self._issued += 1
