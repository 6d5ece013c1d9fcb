"""The models of the campaign: two, of different record sizes, that share a budget.

Importing this module makes what every record must hold, so that a process which has imported
it forks workers that need not.
"""

from pathlib import Path
from typing import NamedTuple

from expertd_testing.handmade import PAGE, make_pack, record


class Spec(NamedTuple):
    """A handmade pack."""

    layers: int
    experts: int
    experts_per_token: int
    record_bytes: int
    seed: int

    @property
    def num_bytes(self) -> int:
        return self.layers * self.experts * self.record_bytes

    @property
    def working_set_bytes(self) -> int:
        return self.layers * self.experts_per_token * self.record_bytes


SPECS = {
    "small": Spec(layers=6, experts=16, experts_per_token=2, record_bytes=6 * PAGE, seed=11),
    "large": Spec(layers=4, experts=12, experts_per_token=2, record_bytes=15 * PAGE, seed=12),
}
RECORDS = {
    (name, layer, expert): record(layer, expert, spec.record_bytes, spec.seed)
    for name, spec in SPECS.items()
    for layer in range(spec.layers)
    for expert in range(spec.experts)
}
BUDGET_BYTES = sum(spec.num_bytes for spec in SPECS.values()) // 3


def make_packs(directory: Path) -> dict[str, Path]:
    """Writes the packs; their paths by name."""
    return {name: make_pack(directory / name, **spec._asdict()) for name, spec in SPECS.items()}
