"""The options of ``expert-run`` that say where experts are computed; they make DeviceSettings."""

from typing import Annotated

import typer

from expertd_inference.settings import CachePolicy, DecodeGraphsMode, DeviceSettings, OnMiss
from expertstore.errors import InvalidInputError
from expertstore.sizes import parse_bytes

Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: cpu, a GPU as in cuda:0, or several with commas between them, "
        "which share the layers.",
        metavar="DEVICE",
    ),
]
CacheBytes = Annotated[
    str | None,
    typer.Option(
        help="On a GPU: memory for experts on each, as in 8GiB. Default: what is free once the "
        "rest of the model is there, but for a reserve.",
        metavar="SIZE",
    ),
]
Policy = Annotated[
    CachePolicy,
    typer.Option(
        help="On a GPU: which expert makes room. lru: each layer's least recently used; aged: of "
        "all layers the least used, where a use fades with time."
    ),
]
SpeculateLayers = Annotated[
    int | None,
    typer.Option(
        help="Guess the experts of so many next layers, and bring them early; 0 for none. Default: "
        "1 on a GPU; on the CPU 0, 1 or 2, whichever tokens are measured to come fastest with.",
        min=0,
        max=3,
    ),
]
SpeculateExperts = Annotated[
    int | None,
    typer.Option(
        help="How many experts to guess of each of them. Default: 2 on a GPU, as many as a token "
        "uses on the CPU.",
        min=1,
    ),
]
StagingSlots = Annotated[
    int | None,
    typer.Option(
        help="On a GPU: guesses that may wait there to be used, beside the cache. Default: 4, or "
        "as many as are guessed.",
        min=0,
    ),
]
OnMissOption = Annotated[
    OnMiss,
    typer.Option(
        help="On a GPU: what to do about an expert that is not in its cache: copy it, compute it "
        "on the CPU from shared memory, or (auto) whatever is measured to be faster."
    ),
]

DecodeGraphs = Annotated[
    DecodeGraphsMode,
    typer.Option(
        help="On one GPU: record a step of decoding as CUDA graphs, and repeat it. segments: all "
        "but the experts, which the host brings; whole: the GPU brings them by itself; auto: whole "
        "where the driver maps shared memory and the link is fast, else segments."
    ),
]


def size_of(option: str, value: str | None) -> int | None:
    """Bytes of a size as in 8GiB. Raises InvalidInputError that names the option."""
    try:
        return None if value is None else parse_bytes(value)
    except ValueError as error:
        raise InvalidInputError(f"{option}: {error}.") from error


DEFAULTS = DeviceSettings()
