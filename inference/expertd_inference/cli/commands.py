"""All commands of ``expert-run``.

torch and transformers are imported only once the arguments are right and the daemon has
answered, so help and most refusals come at once.
"""

import errno
import sys
from typing import Annotated, NoReturn

import typer

import expertstore
from expertd_inference.cli.advise import advise
from expertd_inference.cli.batch import batch
from expertd_inference.cli.chat import chat
from expertd_inference.cli.generate import generate
from expertd_inference.cli.key import key
from expertd_inference.cli.serve import serve
from expertd_inference.cli.text_output import complain, discard, prepare_streams
from expertd_inference.cli.trace import trace
from expertstore.errors import ExpertdError

EXIT_USAGE = 2

app = typer.Typer(
    name="expert-run",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


def run() -> NoReturn:
    """Runs the one that is asked for; expected failures are one line on stderr and exit code 2."""
    prepare_streams()
    code: str | int | None = 0
    try:
        try:
            app()
        except SystemExit as ended:
            code = ended.code
        if sys.stdout is not None:
            sys.stdout.flush()
    except ExpertdError as error:
        complain(str(error))
        code = EXIT_USAGE
    except BrokenPipeError:
        # The reader of our output left, or there is no room for it: see below.
        code = 1
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG):
            raise
        complain(f"The output cannot be written: {error.strerror}.")
        code = EXIT_USAGE
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        # Python's own flush at exit must not find that out, too.
        discard(sys.stdout)
    sys.exit(code)


def _show_version(value: bool) -> None:
    if value:
        typer.echo(f"expert-run {expertstore.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Run Mixture-of-Experts models whose experts `expertd` holds in shared memory."""


app.command()(generate)
app.command()(chat)
app.command()(serve)
app.command()(batch)
app.command()(key)
app.command()(advise)
app.command()(trace)
