"""``expertd stats``, ``models``, ``health``, ``load``, ``limit``, ``unload``."""

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertd.settings.disk_io import DiskIo, parse_disk_io
from expertd.settings.limits import ModelLimits
from expertstore.errors import (
    ConfigError,
    DeadlineError,
    PermissionDeniedError,
    UnavailableError,
)
from expertstore.sizes import format_bytes, parse_bytes
from expertstore.socket_directory import find_daemon

if TYPE_CHECKING:  # gRPC takes time that --help need not
    from expertd_client import Client

Socket = Annotated[
    Path,
    typer.Option(
        metavar="DIR",
        readable=False,
        default_factory=find_daemon,
        help="The daemon's socket directory. Default: $XDG_RUNTIME_DIR/expertd if a daemon of "
        "yours is there, else /run/expertd.",
        show_default=False,
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]

CALL_SECONDS = 60.0
"""A command waits so long for the daemon's answer."""
HEALTH_SECONDS = 5.0

_MAX_WIDTH = 2000
_EXIT_UNHEALTHY = 1


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    for command in (stats, models, health, load, limit, unload):
        app.command()(command)


def stats(socket: Socket, as_json: Json = False) -> None:
    """Shows what the daemon holds and what moved: arena, models, sessions.

    Host hits are accesses of all workers to records that were in RAM, NVMe misses those
    that had to be read first. docs/operating.md says what each line means; `expertd top` is a live
    view.

    Example: `expertd stats --json`
    """
    with _daemon(socket) as daemon:
        report = daemon.stats()
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    _print_stats(report)


def models(socket: Socket, as_json: Json = False) -> None:
    """Lists the models that the daemon holds.

    Example: `expertd models`
    """
    with _daemon(socket) as daemon:
        rows = daemon.list_models()
    if as_json:
        plain = [asdict(row) | {"pack_path": str(row.pack_path)} for row in rows]
        typer.echo(json.dumps({"models": plain}, indent=1))
        return
    _print_table(
        f"models at {socket}",
        ("model", "resident", "size", "scheme", "architecture", "pack"),
        [
            (
                row.name,
                f"{row.num_resident} of {row.num_experts}",
                format_bytes(row.expert_bytes),
                row.scheme,
                row.architecture,
                row.pack_path,
            )
            for row in rows
        ],
    )


def health(socket: Socket) -> None:
    """Asks the daemon whether it serves, as an orchestrator's health check does.

    Exit code 0: it serves, 1: it does not answer within 5 seconds, or is stopping.

    Example: `expertd health`
    """
    try:
        with _daemon(socket) as daemon:
            serves = daemon.serves(timeout_seconds=HEALTH_SECONDS)
    except (UnavailableError, DeadlineError, PermissionDeniedError) as error:
        typer.echo(f"expertd: {error}", err=True)
        raise typer.Exit(_EXIT_UNHEALTHY) from None
    typer.echo("serving" if serves else "not serving")
    if not serves:
        raise typer.Exit(_EXIT_UNHEALTHY)


def load(
    name: Annotated[str, typer.Argument(metavar="NAME", help="What workers ask for.")],
    pack: Annotated[
        Path, typer.Argument(metavar="PACK", readable=False, help="The pack's directory.")
    ],
    socket: Socket,
    min_: Annotated[
        str | None,
        typer.Option("--min", metavar="SIZE", help="RAM that other models' needs leave it."),
    ] = None,
    max_: Annotated[
        str | None, typer.Option("--max", metavar="SIZE", help="RAM that it never exceeds.")
    ] = None,
    pin: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LAYER:EXPERT",
            help="Experts that stay resident; numbers, ranges A-B or * for all. Repeatable.",
        ),
    ] = None,
    disk_io: Annotated[
        str | None,
        typer.Option(
            metavar="WAY",
            help="How it is read: auto, direct or mmap; default: as the daemon's settings say.",
        ),
    ] = None,
) -> None:
    """Opens another pack in a running daemon. Needs root or the daemon's own user.

    Example: `expertd load mixtral /packs/mixtral --min 2GiB --pin "0:*"`
    """
    limits = ModelLimits(_size("--min", min_) or 0, _size("--max", max_), tuple(pin or ()))
    way = parse_disk_io(disk_io) if disk_io is not None else None
    with _daemon(socket) as daemon:
        row = daemon.load_model(
            name,
            pack,
            min_bytes=limits.min_bytes,
            max_bytes=limits.max_bytes,
            pins=limits.pins,
            disk_io=way,
        )
    pinned = f"; {row.num_pinned} are pinned and read now" if row.num_pinned else ""
    typer.echo(
        f"loaded {name}: {row.num_experts} experts, {format_bytes(row.expert_bytes)}; "
        f"they are read when they are used{pinned}."
    )


def limit(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model.")],
    socket: Socket,
    min_: Annotated[
        str | None,
        typer.Option("--min", metavar="SIZE", help="RAM that other models' needs leave it."),
    ] = None,
    max_: Annotated[
        str | None,
        typer.Option("--max", metavar="SIZE", help="RAM that it never exceeds; none: no maximum."),
    ] = None,
) -> None:
    """Changes how much RAM a loaded model keeps and may take; what is not given stays.

    Needs root or the daemon's own user.

    Example: `expertd limit mixtral --max 8GiB`
    """
    largest = 0 if max_ == "none" else _size("--max", max_)
    if largest == 0 and max_ != "none":
        raise ConfigError("--max is 0; give a size, or none for no maximum.")
    with _daemon(socket) as daemon:
        row = daemon.set_limits(name, min_bytes=_size("--min", min_), max_bytes=largest)
    most = format_bytes(row.max_bytes) if row.max_bytes else "all that the others leave"
    typer.echo(f"{name} keeps {format_bytes(row.min_bytes)} and may take {most}.")


def unload(
    name: Annotated[str, typer.Argument(metavar="NAME", help="The model to drop.")],
    socket: Socket,
) -> None:
    """Drops a model from a running daemon and ends its sessions.

    Needs root or the daemon's own user.

    Example: `expertd unload mixtral`
    """
    with _daemon(socket) as daemon:
        released = daemon.unload_model(name)
    typer.echo(f"unloaded {name}: {format_bytes(released)} of RAM came free.")


def _daemon(socket: Path) -> "Client":
    from expertd_client import Client

    return Client(socket, timeout_seconds=CALL_SECONDS)


def _size(option: str, text: str | None) -> int | None:
    try:
        return parse_bytes(text) if text is not None else None
    except ValueError as error:
        raise ConfigError(f"{option}: {error}.") from error


def _print_stats(report: dict[str, Any]) -> None:
    arena = report["arena"]
    _print_table(
        f"expertd {report['incarnation']}, up {report['uptime_seconds']:.0f} s, "
        f"policy {report['policy']}",
        ("arena", "used", "locked", "huge pages"),
        [
            [
                format_bytes(arena[key])
                for key in ("bytes_total", "bytes_used", "locked", "huge_pages")
            ]
        ],
    )
    # A column per model: their names differ in length, the figures do not.
    columns = [_model_column(model) for model in report["models"]]
    if columns:
        names, *lines = zip(_MODEL_LINES, *columns, strict=True)
        _print_table("models", names, lines)
    _print_table(
        "sessions",
        ("id", "role", "pid", "uid", "model", "attached", "epoch lag", "keeps", "read"),
        [
            (row["id"], row["role"], row["pid"] or "-", row["uid"], row["model"] or "-",
             f"{row['attached_seconds']:.0f} s", row["epoch_lag"], format_bytes(row["kept_bytes"]),
             format_bytes(row["bytes_read"]))
            for row in report["sessions"]
        ],
    )  # fmt: skip
    tables = [(model["name"], table) for model in report["models"] for table in model["tables"]]
    if tables:
        _print_table(
            f"tables: {format_bytes(report['arena']['table_bytes'])} of the arena are for rows",
            ("model", "table", "size", "in RAM", "hits", "misses", "NVMe read", "evictions",
             "hinted", "lost"),
            [
                (name, table["name"], format_bytes(table["table_bytes"]),
                 format_bytes(table["num_resident"] * table["row_bytes"]), table["hits"],
                 table["misses"], format_bytes(table["nvme_bytes_read"]), table["evictions"],
                 table["prefetched"], table["rows_lost"])
                for name, table in tables
            ],
        )  # fmt: skip
    if report["peers"]:
        _print_table(
            "peers by TCP",
            ("name", "reads", "read", "idle"),
            [
                (row["name"], row["num_reads"], format_bytes(row["bytes_read"]),
                 f"{row['idle_seconds']:.0f} s")
                for row in report["peers"]
            ],
        )  # fmt: skip
    for warning in report["warnings"]:
        typer.echo(f"warning: {warning}", err=True)


_MODEL_LINES = (
    "model",
    "resident",
    "in RAM",
    "minimum",
    "maximum",
    "pinned",
    "host hits",
    "NVMe misses",
    "NVMe read",
    "read by",
    "direct, tried",
    "mmap, tried",
    "page cache",
    "evictions",
    "moves",
    "from the pack",
    "records lost",
    "adopted",
    "dropped",
    "prefetch issued",
    "prefetch useful",
    "prefetch late",
    "prefetch wasted",
)


def _model_column(model: dict[str, Any]) -> list[object]:
    prefetch, disk = model["prefetch"], model["disk"]
    return [
        model["name"],
        f"{model['num_resident']} of {model['num_experts']}",
        format_bytes(model["resident_bytes"]),
        format_bytes(model["min_bytes"]) if model["min_bytes"] else "-",
        format_bytes(model["max_bytes"]) if model["max_bytes"] else "-",
        f"{model['num_pinned_resident']} of {model['num_pinned']}" if model["num_pinned"] else "-",
        model["host_hits"],
        model["nvme_misses"],
        format_bytes(model["nvme_bytes_read"]),
        disk["way"] + (" (auto)" if disk["asked"] == DiskIo.AUTO else ""),
        *(
            f"{format_bytes(int(disk[key]))}/s" if disk[key] else "-"
            for key in ("direct_bytes_per_second", "mmap_bytes_per_second")
        ),
        format_bytes(disk["page_cache"]) if disk["page_cache"] else "-",
        model["evictions"],
        model["moves"],
        model["records_in_pack"],
        model["records_lost"],
        model["adopted_records"],
        model["dropped_records"],
        *(prefetch[key] for key in ("issued", "useful", "late", "wasted")),
    ]


def _print_table(title: str, columns: Sequence[object], rows: Iterable[Sequence[object]]) -> None:
    """A row a line, however long: a terminal folds it, and a pipe's reader finds it whole."""
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(Text(str(column)), no_wrap=True)
    for row in rows:
        table.add_row(*(Text(str(value)) for value in row))
    console = Console(width=_MAX_WIDTH, highlight=False)
    console.print(Text(title))
    if table.row_count:
        console.print(table)
    else:
        console.print("  none\n")
