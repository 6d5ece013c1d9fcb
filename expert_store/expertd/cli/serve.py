"""``expertd serve``."""

import os
from pathlib import Path
from typing import Annotated

import typer

from expertd.settings.config import load_config, parse_model
from expertd.settings.disk_io import parse_disk_io
from expertd.settings.loopback import LoopbackAddress, parse_loopback
from expertstore.errors import ConfigError
from expertstore.sizes import parse_bytes


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command()(serve)


def serve(
    socket: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            readable=False,
            help="Directory for the sockets; made if missing. Default: $XDG_RUNTIME_DIR/expertd, "
            "or /run/expertd for root and where there is no such variable.",
        ),
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(metavar="SIZE", help="RAM for experts of all models, e.g. 512MiB or 24GiB."),
    ] = None,
    table_ram: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="Of it, RAM for rows of tables (n-gram or per-layer embeddings). Default: what "
            "the experts leave, at least an eighth; nothing if no model has a table.",
        ),
    ] = None,
    model: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=PACK",
            help="A pack to serve; may be given several times. A NAME alone is that of a pack that "
            "`expertd packs` lists.",
        ),
    ] = None,
    disk_io: Annotated[
        str | None,
        typer.Option(
            metavar="WAY", help="How packs are read: auto (the faster way), direct or mmap."
        ),
    ] = None,
    metrics: Annotated[
        str | None,
        typer.Option(
            metavar="HOST:PORT", help="Serve Prometheus metrics at this loopback address."
        ),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE.toml", readable=False, help="Settings; the options here override them."
        ),
    ] = None,
) -> None:
    """Holds experts in shared RAM and serves them to the workers of this host.

    What does not fit into the RAM budget stays on disk and is read when it is asked for.
    Runs in the foreground until SIGTERM or Ctrl-C; prints one line when it serves.

    Exit code 0: it was stopped, 2: a setting or a pack is wrong, 75: too little memory is free
    just now.

    Example: `expertd serve --ram 24GiB --model mixtral=/packs/mixtral`
    """
    # numpy's BLAS, which nothing here calls, would start a thread and take 32 MiB per core.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Before gRPC is imported: it writes a line for each handshake that fails, and anybody who
    # reaches the TCP port could fill the log.
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")
    from expertd.daemon import serve as run  # grpc and numpy: not for --help

    models = None
    if model:
        models = dict(map(parse_model, model))
        if len(models) < len(model):
            raise ConfigError("two models are given the same name; each needs its own.")
    run(
        load_config(
            config,
            socket=socket,
            ram_bytes=_size(ram, "--ram"),
            table_ram_bytes=_size(table_ram, "--table-ram"),
            models=models,
            disk_io=parse_disk_io(disk_io) if disk_io is not None else None,
            metrics=_address(metrics),
        )
    )


def _size(text: str | None, option: str) -> int | None:
    try:
        return parse_bytes(text) if text is not None else None
    except ValueError as error:
        raise ConfigError(f"{option}: {error}.") from error


def _address(text: str | None) -> LoopbackAddress | None:
    try:
        return parse_loopback(text) if text is not None else None
    except ValueError as error:
        raise ConfigError(f"--metrics: {error}.") from error
