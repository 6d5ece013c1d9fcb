"""``expertd top``: a live view of a running daemon."""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from expertd.cli.admin import Socket
from expertstore.errors import ConfigError
from expertstore.interrupts import interruptible

if TYPE_CHECKING:
    from rich.console import Console

    from expertd.cli.top_feed import Event, Feed
    from expertd.cli.top_view import View

_POLL_SECONDS = 0.1
_SVG_SIZE = (120, 40)


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command()(top)


def top(
    socket: Socket,
    model: Annotated[
        str, typer.Option(metavar="NAME", help="Whose heat map to show; by default the first's.")
    ] = "",
    interval: Annotated[
        float, typer.Option(metavar="SECONDS", min=0.05, max=3600, help="Between two looks.")
    ] = 1.0,
    once: Annotated[bool, typer.Option("--once", help="Print one frame and exit.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object per interval instead.")
    ] = False,
    svg: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            readable=False,
            hidden=True,
            help="Draw one frame of 120 x 40 into FILE.",
        ),
    ] = None,
) -> None:
    """Shows live what the daemon does: tiers, models, sessions, and a heat map of the experts.

    Keys: Tab the next model's heat map, q quit. A daemon that goes away is waited for; a
    directory that does not exist is a mistake. Figures are of the last interval where nothing else
    is said; --once takes two looks for that.

    Example: `expertd top --model mixtral`
    """
    from rich.console import Console

    from expertd.cli.top_feed import Feed
    from expertd.cli.top_view import View

    if interval != interval:  # not a number, which passes both bounds
        raise ConfigError("--interval is not a number; give seconds.")
    view = View(socket)
    with interruptible(), suppress(KeyboardInterrupt):
        signal.signal(signal.SIGTERM, _interrupt)  # the terminal is to be given back as it was
        with Feed(socket, model, interval) as feed:
            if as_json:
                _print_json(view, feed, socket, once=once)
            elif svg is not None:
                _draw(view, feed, socket, svg)
            elif once or not sys.stdout.isatty():
                _print_frames(view, feed, socket, Console(highlight=False), once=once)
            else:
                _show(view, feed, Console(highlight=False))


def _show(view: "View", feed: "Feed", console: "Console") -> None:
    """Until somebody presses q."""
    from rich.live import Live

    from expertd.cli.keys import Keys

    with Live(console=console, screen=True, auto_refresh=False) as live, Keys() as keys:
        shown: object = None
        while True:
            event = feed.next(_POLL_SECONDS)
            if event is not None:
                _take(view, event)
            for key in keys.pressed():
                if key == "q":
                    return
                if key == "\t":
                    feed.model = view.next_model()
            now = (view.version, console.size, view.is_late())
            if now != shown:
                shown = now
                live.update(view.frame(*console.size), refresh=True)


def _print_frames(
    view: "View", feed: "Feed", socket: Path, console: "Console", *, once: bool
) -> None:
    while True:
        _next_sample(view, feed, socket, once=once)
        width, height = console.size
        console.print(view.frame(width, height if console.is_terminal else None))
        if once:
            return


def _print_json(view: "View", feed: "Feed", socket: Path, *, once: bool) -> None:
    while True:
        _next_sample(view, feed, socket, once=once)
        print(json.dumps(view.plain()), flush=True)  # noqa: T201
        if once:
            return


def _draw(view: "View", feed: "Feed", socket: Path, path: Path) -> None:
    from rich.console import Console

    _next_sample(view, feed, socket, once=True)
    width, height = _SVG_SIZE
    with Path(os.devnull).open("w") as nowhere:
        console = Console(
            record=True, width=width, height=height, file=nowhere, force_terminal=True,
            color_system="truecolor", highlight=False,
        )  # fmt: skip
        console.print(view.frame(width, height - 1))
    path.write_text(console.export_svg(title="expertd top", unique_id="top"))


def _next_sample(view: "View", feed: "Feed", socket: Path, *, once: bool) -> None:
    """Takes in a sample that rates can be told of; for ``once`` a daemon must be there."""
    from expertd.cli.top_feed import Waiting

    said = False
    while True:
        event = feed.next(_POLL_SECONDS)
        if event is None:
            continue
        if not _take(view, event):
            if once and isinstance(event, Waiting):
                raise event.error
            if not said:
                said = True
                print(f"waiting for expertd at {socket}", file=sys.stderr, flush=True)  # noqa: T201
        elif view.has_rates or not once:
            return


def _take(view: "View", event: "Event") -> bool:
    """Whether the event was a sample. Raises what the user has to know."""
    from expertd.cli.top_feed import Failed, Sample

    if isinstance(event, Failed):
        raise event.error
    if isinstance(event, Sample):
        view.take(event, time.monotonic())
        return True
    view.wait()
    return False


def _interrupt(number: int, frame: Any) -> None:  # noqa: ANN401
    raise KeyboardInterrupt
