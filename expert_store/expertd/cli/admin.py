"""``expertd stats``, ``models``, ``load``, ``unload``: talking to a running daemon."""

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from expertd.sizes import format_bytes

Socket = Annotated[
    Path, typer.Option(metavar="DIR", help="The daemon's socket directory.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    for command in (stats, models, load, unload):
        app.command()(command)


def stats(socket: Socket, as_json: Json = False) -> None:
    """Shows what the daemon holds and what moved: arena, models, sessions.

    Host hits are accesses of all workers to records that were in RAM, NVMe misses those
    that had to be read first.

    Example: `expertd stats --socket /run/expertd --json`
    """
    from expertd.control import Control

    with Control(socket) as control:
        report = control.stats()
    if as_json:
        typer.echo(json.dumps(report, indent=1))
        return
    _print_stats(report)


def models(socket: Socket, as_json: Json = False) -> None:
    """Lists the models that the daemon holds."""
    from expertd.control import Control

    with Control(socket) as control:
        rows = control.models()
    if as_json:
        typer.echo(json.dumps({"models": rows}, indent=1))
        return
    _print_table(
        f"models at {socket}",
        ("model", "architecture", "scheme", "experts", "resident", "size", "pack"),
        [
            (
                row["name"],
                row["architecture"],
                row["scheme"],
                row["num_experts"],
                row["num_resident"],
                format_bytes(row["expert_bytes"]),
                row["pack_path"],
            )
            for row in rows
        ],
    )


def load(
    name: Annotated[str, typer.Argument(help="The name that workers attach to.")],
    pack: Annotated[Path, typer.Argument(help="The pack's directory.")],
    socket: Socket,
) -> None:
    """Opens another pack in a running daemon. Needs root or the daemon's own user.

    Example: `expertd load mixtral /packs/mixtral --socket /run/expertd`
    """
    from expertd.control import Control

    with Control(socket) as control:
        row = control.load(name, pack.absolute())
    typer.echo(
        f"loaded {name}: {row['num_experts']} experts, {format_bytes(row['expert_bytes'])}; "
        "they are read when they are used."
    )


def unload(
    name: Annotated[str, typer.Argument(help="The model to drop.")],
    socket: Socket,
) -> None:
    """Drops a model from a running daemon and ends its sessions."""
    from expertd.control import Control

    with Control(socket) as control:
        released = control.unload(name)
    typer.echo(f"unloaded {name}: {format_bytes(released)} of RAM are free for other models.")


def _print_stats(report: dict[str, Any]) -> None:
    arena = report["arena"]
    _print_table(
        f"expertd {report['incarnation']}, up {report['uptime_seconds']:.0f} s",
        ("arena", "used", "locked", "huge pages"),
        [tuple(map(format_bytes, (arena["bytes_total"], arena["bytes_used"], arena["locked"],
                                  arena["huge_pages"])))],
    )  # fmt: skip
    _print_table(
        "models",
        ("model", "resident", "host hits", "NVMe misses", "NVMe read", "evictions",
         "prefetch issued/useful/late/wasted"),
        [
            (
                model["name"],
                f"{model['num_resident']} of {model['num_experts']}",
                model["host_hits"],
                model["nvme_misses"],
                format_bytes(model["nvme_bytes_read"]),
                model["evictions"],
                "/".join(str(model["prefetch"][key])
                         for key in ("issued", "useful", "late", "wasted")),
            )
            for model in report["models"]
        ],
    )  # fmt: skip
    _print_table(
        "sessions",
        ("id", "pid", "uid", "model", "attached", "epoch lag"),
        [
            (row["id"], row["pid"], row["uid"], row["model"] or "-",
             f"{row['attached_seconds']:.0f} s", row["epoch_lag"])
            for row in report["sessions"]
        ],
    )  # fmt: skip
    for warning in report["warnings"]:
        typer.echo(f"warning: {warning}", err=True)


def _print_table(title: str, columns: tuple[str, ...], rows: list[tuple[object, ...]]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column)
    for row in rows:
        table.add_row(*map(str, row))
    Console().print(table)
