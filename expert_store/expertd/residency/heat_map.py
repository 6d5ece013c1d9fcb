"""A model's heat as it travels, and shrunk to what a terminal can show."""

from typing import NamedTuple, Self

import numpy as np
import numpy.typing as npt

from expertstore.v1 import expert_store_pb2 as pb

Grid = npt.NDArray[np.float64]


class HeatMap(NamedTuple):
    """Layer by expert; layers with fewer experts than others end in NaN."""

    layers: tuple[int, ...]
    """Decoder layer numbers, one a row."""
    heat: Grid
    """From 0 to 1: the square root of each expert's share of the hottest one's heat."""
    resident: Grid
    """1 for an expert in RAM, 0 for one that is not."""

    @classmethod
    def of(cls, response: pb.GetHeatResponse) -> Self:
        """What the daemon answered."""
        heat = np.frombuffer(response.heat, np.uint8) / 255
        bits = np.unpackbits(np.frombuffer(response.resident, np.uint8), bitorder="little")
        shape = len(response.layers), max((row.num_experts for row in response.layers), default=0)
        grids = np.full(shape, np.nan), np.full(shape, np.nan)
        start = 0
        for row, layer in enumerate(response.layers):
            end = start + layer.num_experts
            grids[0][row, : layer.num_experts] = heat[start:end]
            grids[1][row, : layer.num_experts] = bits[start:end]
            start = end
        return cls(tuple(layer.layer for layer in response.layers), *grids)

    def shrink(self, num_rows: int, num_columns: int) -> Self:
        """At most so many rows and columns: cells of equal size, as near as can be, averaged.

        Of heat the hottest in a cell is kept instead: one hot expert among many cold is news.
        """
        rows, columns = self.heat.shape
        row_starts = _starts(rows, num_rows)
        column_starts = _starts(columns, num_columns)

        def reduce(grid: Grid, how: "np.ufunc") -> Grid:
            cells: Grid = how.reduceat(grid, row_starts, axis=0)
            return np.asarray(how.reduceat(cells, column_starts, axis=1))

        there = ~np.isnan(self.heat)
        counts = reduce(there.astype(float), np.add)
        heat = reduce(np.where(there, self.heat, -1.0), np.maximum)
        resident = reduce(np.where(there, self.resident, 0.0), np.add)
        with np.errstate(invalid="ignore"):
            return type(self)(
                tuple(self.layers[start] for start in row_starts),
                np.where(counts > 0, heat, np.nan),
                np.where(counts > 0, resident / counts, np.nan),
            )


def _starts(size: int, most: int) -> list[int]:
    """Where each of at most ``most`` bins of ``size`` things begins."""
    count = min(size, max(1, most))
    return [index * size // count for index in range(count)]
