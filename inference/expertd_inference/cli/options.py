"""The options that commands of ``expert-run`` share: where a model is, and how it is computed."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from expertd_client import TlsFiles
from expertd_inference.settings import (
    Activations,
    CachePolicy,
    ComputeDtype,
    DecodeGraphsMode,
    DeviceSettings,
    KernelsName,
    OnMiss,
)
from expertstore.errors import InvalidInputError, PreconditionError
from expertstore.pack.place import named_pack
from expertstore.sizes import parse_bytes

# The groups of --help.
DAEMON = "The daemon"
FAR_DAEMON = "A daemon on another host (tcp://)"
COMPUTING = "Computing"
GPU = "On a GPU"
ACCESS = "Who may ask"
"""Of a server."""

Device = Annotated[
    str,
    typer.Option(
        help="Where to compute: cpu, a GPU as in cuda:0, or several with commas between them, "
        "which share the layers.",
        metavar="DEVICE",
        rich_help_panel=COMPUTING,
    ),
]
CacheBytes = Annotated[
    str | None,
    typer.Option(
        help="Memory for experts on each, as in 8GiB. Default: what is free once the "
        "rest of the model is there, but for a reserve.",
        metavar="SIZE",
        rich_help_panel=GPU,
    ),
]
Policy = Annotated[
    CachePolicy,
    typer.Option(
        help="Which expert makes room. lru: each layer's least recently used; aged: of "
        "all layers the least used, where a use fades with time.",
        rich_help_panel=GPU,
    ),
]
SpeculateLayers = Annotated[
    int | None,
    typer.Option(
        help="Guess the experts of so many next layers, and bring them early; 0 for none. Default: "
        "1 on a GPU; on the CPU 0, 1 or 2, whichever tokens are measured to come fastest with.",
        min=0,
        max=3,
        rich_help_panel=COMPUTING,
    ),
]
SpeculateExperts = Annotated[
    int | None,
    typer.Option(
        help="How many experts to guess of each of them. Default: 2 on a GPU, as many as a token "
        "uses on the CPU.",
        min=1,
        rich_help_panel=COMPUTING,
    ),
]
StagingSlots = Annotated[
    int | None,
    typer.Option(
        help="Guesses that may wait there to be used, beside the cache. Default: 4, or "
        "as many as are guessed.",
        min=0,
        rich_help_panel=GPU,
    ),
]
OnMissOption = Annotated[
    OnMiss,
    typer.Option(
        help="What to do about an expert that is not in its cache: copy it, compute it "
        "on the CPU from shared memory, or (auto) whatever is measured to be faster.",
        rich_help_panel=GPU,
    ),
]

DecodeGraphs = Annotated[
    DecodeGraphsMode,
    typer.Option(
        help="On one GPU: record a step of decoding as CUDA graphs, and repeat it. segments: all "
        "but the experts, which the host brings; whole: the GPU brings them by itself; auto: whole "
        "where the driver maps shared memory and the link is fast, else segments.",
        rich_help_panel=GPU,
    ),
]


Socket = Annotated[
    str | None,
    typer.Option(
        help="The directory that the daemon serves in, or tcp://HOST:PORT. Default: "
        "$XDG_RUNTIME_DIR/expertd if a daemon of yours is there, else /run/expertd.",
        metavar="DIR",
        rich_help_panel=DAEMON,
    ),
]


def find_pack(path: Path | None) -> Path | None:
    """The pack that an option names, by its path or as ``expertd packs`` lists it."""
    return None if path is None else named_pack(path)


Embedded = Annotated[
    Path | None,
    typer.Option(
        help="Without a daemon: start one for this pack, a path or a name that `expertd packs` "
        "lists, and stop it at the end.",
        metavar="PACK",
        readable=False,
        rich_help_panel=DAEMON,
        callback=find_pack,
    ),
]

Ram = Annotated[
    str | None,
    typer.Option(
        help="With --embedded: memory for experts, as in 8GiB. Default: all of "
        "them, or half of the free memory.",
        metavar="SIZE",
        rich_help_panel=DAEMON,
    ),
]

TlsCa = Annotated[
    Path | None,
    typer.Option(
        help="Who signed the daemon's certificate.",
        metavar="PEM",
        readable=False,
        rich_help_panel=FAR_DAEMON,
    ),
]

TlsCert = Annotated[
    Path | None,
    typer.Option(
        help="This client's certificate.", metavar="PEM", readable=False, rich_help_panel=FAR_DAEMON
    ),
]

TlsKey = Annotated[
    Path | None,
    typer.Option(
        help="Its private key.", metavar="PEM", readable=False, rich_help_panel=FAR_DAEMON
    ),
]

Pack = Annotated[
    Path | None,
    typer.Option(
        help="This host's copy of the pack, whose experts-* may be left out.",
        metavar="PACK",
        readable=False,
        rich_help_panel=FAR_DAEMON,
    ),
]

Cache = Annotated[
    str | None,
    typer.Option(
        help="Where the daemon's memory cannot be shared: memory for copies of experts, as in "
        "8GiB. Default: all of them, or half of the free memory.",
        metavar="SIZE",
        rich_help_panel=FAR_DAEMON,
    ),
]

Dtype = Annotated[
    ComputeDtype | None,
    typer.Option(
        help="Compute in this. Default: what the checkpoint is in.", rich_help_panel=COMPUTING
    ),
]

Threads = Annotated[
    int | None,
    typer.Option(
        min=1, help="CPU threads to compute with. Default: all cores.", rich_help_panel=COMPUTING
    ),
]

Kernels = Annotated[
    KernelsName,
    typer.Option(
        help="What computes on the CPU. auto: native, but for packs of 16-bit experts, whose "
        "reference computes them as stock transformers does.",
        rich_help_panel=COMPUTING,
    ),
]

Exact = Annotated[
    bool,
    typer.Option(
        "--exact",
        help="The very same text, whatever else is computed beside it: slower for one sequence.",
        rich_help_panel=COMPUTING,
    ),
]

ActivationsOption = Annotated[
    Activations,
    typer.Option(
        help="Bits of what meets quantized weights, where a step has several rows: 8 is "
        "faster, and rounds.",
        rich_help_panel=COMPUTING,
    ),
]

MaxSequences = Annotated[
    int,
    typer.Option(
        min=1, help="How many sequences a model computes together.", rich_help_panel=COMPUTING
    ),
]

ExpertsPerToken = Annotated[
    int | None,
    typer.Option(
        min=1,
        help="Compute a token by so many of the experts that each router chooses, those of "
        "greatest weight: faster, and not what the model was trained to do. Default: all of them.",
        metavar="K",
        rich_help_panel=COMPUTING,
    ),
]

ExpertThreshold = Annotated[
    float | None,
    typer.Option(
        min=0,
        max=1,
        help="Leave out experts whose share of a token's router weights is below this.",
        metavar="P",
        rich_help_panel=COMPUTING,
    ),
]

AdapterOption = Annotated[
    str | None,
    typer.Option(
        "--adapter",
        help="Add an adapter in peft's format (LoRA) to the model: a directory, or a name of "
        "`expertd adapter list`.",
        metavar="ADAPTER",
    ),
]

ChatTemplate = Annotated[
    Path | None,
    typer.Option(
        help="A Jinja file in place of the checkpoint's chat template.",
        metavar="FILE",
        readable=False,
    ),
]

KvTokens = Annotated[
    int | None,
    typer.Option(
        help="How many tokens of all sequences the keys and values have room for. Default: "
        "what the sequences need, or a quarter of the free memory.",
        min=1,
        rich_help_panel=COMPUTING,
    ),
]

ReattachSeconds = Annotated[
    float,
    typer.Option(
        min=0, help="Wait so long for a new daemon if this one ends.", rich_help_panel=DAEMON
    ),
]


@contextmanager
def extra_serve(command: str) -> Iterator[None]:
    """Imports parts of the server. Raises PreconditionError for what is not installed."""
    try:
        yield
    except ModuleNotFoundError as error:
        raise PreconditionError(
            f"expert-run {command} needs {error.name}, which is not installed: "
            "pip install 'expertd[serve]'."
        ) from error


def check_places(ram: str | None, **places: str | Path | None) -> None:
    """Raises InvalidInputError if there are two ``places``, or ``ram`` without ``embedded``."""
    if sum(place is not None for place in places.values()) > 1:
        *names, last = (f"--{name}" for name in places)
        raise InvalidInputError(f"Choose one of {', '.join(names)} and {last}.")
    if places["embedded"] is None and ram is not None:
        raise InvalidInputError("--ram belongs to --embedded; a running daemon has its budget.")


def size_of(option: str, value: str | None) -> int | None:
    """Bytes of a size as in 8GiB. Raises InvalidInputError that names the option."""
    try:
        return None if value is None else parse_bytes(value)
    except ValueError as error:
        raise InvalidInputError(f"{option}: {error}.") from error


def tls_files(ca: Path | None, certificate: Path | None, key: Path | None) -> TlsFiles | None:
    """What is given together. Raises InvalidInputError if some are missing."""
    if ca is None and certificate is None and key is None:
        return None
    if ca is None or certificate is None or key is None:
        raise InvalidInputError("--tls-ca, --tls-cert and --tls-key belong together; give all.")
    return TlsFiles(ca, certificate, key)


DEFAULTS = DeviceSettings()
