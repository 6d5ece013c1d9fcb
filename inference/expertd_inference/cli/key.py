"""``expert-run key``: makes a key for somebody who may use the server."""

from typing import Annotated

import typer

from expertd_inference.server.keys import digest, new_key
from expertstore.errors import InvalidInputError


def key(
    name: Annotated[str, typer.Argument(help="Whose key it is: letters, digits, - and _.")],
    requests_per_minute: Annotated[
        float | None, typer.Option(min=0.01, help="How many requests a minute.")
    ] = None,
    tokens_per_minute: Annotated[
        float | None,
        typer.Option(min=0.01, help="How many tokens a minute, of prompts and answers."),
    ] = None,
    max_sequences: Annotated[
        int | None, typer.Option(min=1, help="How many answers at once.")
    ] = None,
    priority: Annotated[
        int,
        typer.Option(min=-1_000_000, max=1_000_000, help="Goes before lower ones that wait."),
    ] = 0,
) -> None:
    """Print a new key, and the entry for the file that `expert-run serve --keys` reads.

    The file has only the key's hash: this is the one time that the key is shown.

    [bold]Examples[/bold]

      expert-run key alice --tokens-per-minute 20000 >> keys.toml

      expert-run key nightly --priority -1 --max-sequences 4 >> keys.toml

      expert-run serve --embedded ./mixtral-pack --host 0.0.0.0 --keys keys.toml
    """
    if not name.replace("-", "").replace("_", "").isalnum() or not name.isascii():
        raise InvalidInputError(f"The name {name!r} has more than letters, digits, - and _.")
    made = new_key()
    typer.echo(f"The key of {name}, shown this once: {made}", err=True)
    lines = [f"[keys.{name}]", f'sha256 = "{digest(made)}"']
    for field, value in (
        ("requests_per_minute", requests_per_minute),
        ("tokens_per_minute", tokens_per_minute),
        ("max_sequences", max_sequences),
        ("priority", priority or None),
    ):
        if value is not None:
            lines.append(f"{field} = {value}")
    typer.echo("\n".join([*lines, ""]))
