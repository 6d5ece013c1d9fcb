"""``expertd doctor``."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertd.cli.admin import HEALTH_SECONDS, Json, Socket
from expertstore.errors import ExpertdError
from expertstore.socket_directory import may_serve, own_directory

if TYPE_CHECKING:
    from expertd.doctor.checks import Finding
    from expertd.doctor.host import DaemonPlace

_EXIT_BAD = 1
_STYLES = {"ok": "green", "note": "yellow", "bad": "bold red"}


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command()(doctor)


def doctor(
    socket: Socket,
    pack: Annotated[
        Path | None,
        typer.Option(
            metavar="PACK",
            readable=False,
            help="A pack to look at, too, and to read for half a second.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Says whether this host is fit to serve, and what to do about each thing that is not well.

    Looks at the kernel, memory and its limits, huge pages, the disk (of --pack, or here), the GPU
    and its driver, versions, and whether a daemon answers. Changes nothing.

    Exit code 0: it can serve, 1: something prevents it.

    Example: `expertd doctor --pack /packs/mixtral`
    """
    from expertd.doctor.checks import Health, examine
    from expertd.doctor.look import look

    rows = examine(look(pack, _place(socket)))
    if as_json:
        typer.echo(json.dumps({"checks": [vars(row) for row in rows]}, indent=1))
    else:
        _print(rows)
    if any(row.state is Health.BAD for row in rows):
        raise typer.Exit(_EXIT_BAD)


def _place(path: Path) -> "DaemonPlace":
    """The socket directory, and whether a daemon answers there."""
    from expertd.doctor.host import DaemonPlace
    from expertd_client import Client

    serves, other = may_serve(path), own_directory()
    try:
        with Client(path) as daemon:
            serving = daemon.serves(timeout_seconds=HEALTH_SECONDS)
            answer = "serving" if serving else "not serving"
    except ExpertdError as error:
        return DaemonPlace(path, "", str(error), serves, other)
    return DaemonPlace(path, answer, "", serves, other)


def _print(rows: "Sequence[Finding]") -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in ("", "what", "found, and what to do"):
        table.add_column(column, overflow="fold")
    for row in rows:
        found = Text(row.found)
        if row.advice:
            found.append(f"\n{row.advice}", style=_STYLES[row.state])
        table.add_row(Text(row.state, style=_STYLES[row.state]), Text(row.name), found)
    console = Console(highlight=False)
    if not console.is_terminal:
        console.width = 160  # a log has no edge, and commands are to be copied from it
    console.print(table)
