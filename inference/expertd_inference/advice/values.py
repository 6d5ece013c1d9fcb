"""What predictions are made of: plain values, no tensor, nothing measured here."""

from dataclasses import dataclass
from pathlib import Path

from expertstore.pack.layout import Matrix, RecordLayout, record_layout


@dataclass(frozen=True)
class ExpertLayers:
    """``count`` layers alike."""

    count: int
    num_experts: int
    top_k: int
    layout: RecordLayout


@dataclass(frozen=True)
class Need:
    """What a model in one scheme asks of a host."""

    scheme: str
    experts: tuple[ExpertLayers, ...]
    linears: tuple[tuple[Matrix, int], ...]
    """The trunk's matrices that each token passes, without names, and how many of each."""
    trunk_bytes: int
    """Of the trunk's file, which all workers map."""
    dtype: str = "BF16"
    table_bytes: int = 0
    """Of the files of tables, of whose rows a part is in RAM."""

    def rows_bytes(self, budget_bytes: int) -> int:
        """RAM for rows of tables beside ``budget_bytes`` for experts: an eighth of both."""
        return min(self.table_bytes, budget_bytes // 7)

    @property
    def num_layers(self) -> int:
        """MoE layers."""
        return sum(group.count for group in self.experts)

    @property
    def expert_bytes(self) -> int:
        """Of all records."""
        return sum(
            group.count * group.num_experts * group.layout.record_bytes for group in self.experts
        )

    @property
    def working_set_bytes(self) -> int:
        """Of the records that one token uses: the least budget that can serve the model."""
        return sum(group.count * group.top_k * group.layout.record_bytes for group in self.experts)

    @property
    def token_bytes(self) -> int:
        """What one token reads: its experts' records, and the trunk's matrices."""
        return self.working_set_bytes + sum(
            count * matrix_bytes(matrix) for matrix, count in self.linears
        )

    @property
    def max_record_bytes(self) -> int:
        """Of the largest record."""
        return max(group.layout.record_bytes for group in self.experts)

    @property
    def expert_bits(self) -> float:
        """Bits per weight of the experts, scales included."""
        group = self.experts[0]
        weights = sum(m.out_features * m.in_features for m in group.layout.matrices)
        return 8 * group.layout.record_bytes / weights


@dataclass(frozen=True)
class Reading:
    """Seconds until a layer's missing records are in RAM and verified, by how many they are."""

    one: float
    many: float
    num_many: int

    def seconds(self, num: int) -> float:
        """Of ``num`` records asked for at once, on the line through the two that were measured."""
        if num < 1:
            return 0.0
        if self.num_many < 2:
            return num * self.one
        # Noise may make many faster than one; more never takes less time than fewer.
        slope = max(0.0, (self.many - self.one) / (self.num_many - 1))
        return self.one + (num - 1) * slope


@dataclass(frozen=True)
class Gpu:
    """A GPU to plan with. Bytes, and bytes per second."""

    memory_bytes: int
    link_rate: float
    memory_rate: float | None
    """None if it was not measured."""


@dataclass(frozen=True)
class Host:
    """Plain values, of which predictions are made. Rates in bytes per second."""

    cores: int
    threads: int
    """Of each worker."""
    workers: int
    memory_rate: float
    """Read by one worker's threads."""
    memory_rate_all: float
    """Read by all workers' threads together."""
    ram_bytes: int
    """Available now."""
    storage_rate: float
    storage: Path
    disk_free_bytes: int
    gpu: Gpu | None = None


def matrix_bytes(matrix: Matrix) -> int:
    """Of its weights, scales and zeros; 16 bits a weight if it is plain."""
    layout = record_layout((matrix,), "BF16", has_bias=False)
    return sum(part.num_bytes for part in layout.parts)
