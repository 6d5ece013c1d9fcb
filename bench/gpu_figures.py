"""Figures of a GPU say in what state they were measured."""

from dataclasses import dataclass

from bench.figures import Figure


@dataclass(frozen=True)
class GpuFigure(Figure):
    """A figure with the state of what was measured; what does not apply is empty."""

    arena: str = ""
    """How the GPU read the arena: registered, partial or staged."""
    steps: str = ""
    """How steps of one token ran: off, segments or whole."""
    bound: str = ""
    """What the limit is made of: link, memory or launches."""


def of_gpu(figure: Figure, *, arena: str = "", steps: str = "", bound: str = "") -> GpuFigure:
    """The same figure, with its state."""
    return GpuFigure(**vars(figure), arena=arena, steps=steps, bound=bound)
