"""All commands of ``expertd``."""

import errno
import os
import sys
from typing import Annotated

import typer

from expertd.cli import (
    adapter,
    admin,
    deploy_files,
    doctor,
    pack,
    packs,
    record,
    replay,
    serve,
    top,
)
from expertstore import __version__
from expertstore.errors import ExpertdError, ShortMemoryError

_OUTPUT_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO}
"""What writing to a standard output that is a file may meet."""
_EXIT_INPUT = 2
_EXIT_TEMPORARY = 75  # EX_TEMPFAIL of sysexits.h: a service manager may try again

app = typer.Typer(
    name="expertd",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",
    context_settings={"help_option_names": ["-h", "--help"]},
    help=(
        "One host copy of a Mixture-of-Experts model's experts, for any number of workers.\n\n"
        "Pack a checkpoint once, serve it, and let workers generate from it:\n\n"
        "`expertd pack CHECKPOINT PACK`\n\n"
        "`expertd serve --ram 16GiB --model NAME=PACK`\n\n"
        "`expert-run generate --model NAME --prompt TEXT`"
    ),
)
pack.register(app)
packs.register(app)
adapter.register(app)
serve.register(app)
admin.register(app)
record.register(app)
replay.register(app)
top.register(app)
deploy_files.register(app)
doctor.register(app)


def _print_version(value: bool) -> None:
    if value:
        typer.echo(f"expertd {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version.", callback=_print_version, is_eager=True
        ),
    ] = False,
) -> None:
    pass


def run() -> None:
    """Runs the one asked for; a failure is a line, and exit code 2 or, if time helps, 75."""
    try:
        app()
    except ExpertdError as error:
        typer.echo(f"expertd: {error}", err=True)
        sys.exit(_EXIT_TEMPORARY if isinstance(error, ShortMemoryError) else _EXIT_INPUT)
    except BrokenPipeError:
        sys.stderr.close()  # the reader of our output has gone: nothing to say to it
        sys.exit(1)
    except OSError as error:
        if error.errno not in _OUTPUT_ERRORS or error.filename is not None:
            raise
        typer.echo(f"expertd: the output cannot be written: {error.strerror}.", err=True)
        # What is still to be written would be tried once more at the end, and told in a traceback.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
