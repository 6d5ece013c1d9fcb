"""``expertd adapter``: adapters over the models that are served."""

import json
from pathlib import Path
from typing import Annotated

import typer

from expertd.cli.admin import CALL_SECONDS
from expertstore.sizes import format_bytes

commands = typer.Typer(
    no_args_is_help=True,
    help="Adapters in peft's format (LoRA), each over a model that is served.",
)


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    app.add_typer(commands, name="adapter")


@commands.command()
def load(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="What requests call it, in the field `model`.")
    ],
    directory: Annotated[
        Path,
        typer.Argument(
            metavar="DIR",
            readable=False,
            help="With adapter_config.json and adapter_model.safetensors.",
        ),
    ],
    base: Annotated[
        str,
        typer.Option(
            metavar="MODEL", help="A model that the daemon serves, or a pack by its name."
        ),
    ],
    socket: Annotated[
        str | None, typer.Option(metavar="DIR", help="The directory that the daemon serves in.")
    ] = None,
) -> None:
    """Keeps a copy of an adapter under a name; servers and workers of this user have it at once.

    An adapter of that name is replaced. The base's pack is not touched.

    Example: `expertd adapter load sql ./qwen-sql-lora --base qwen`
    """
    from expertd.settings.config import name_of_pack
    from expertstore.adapter_shelf import adapters_directory, load_adapter
    from expertstore.pack.manifest import MANIFEST_NAME
    from expertstore.pack.place import named_pack

    pack = named_pack(Path(base))
    model = base
    if (pack / MANIFEST_NAME).is_file():
        model = name_of_pack(pack.absolute())
    else:
        from expertd_client import Client

        with Client(socket, timeout_seconds=CALL_SECONDS) as daemon:
            pack = daemon.get_model(base).pack_path
    known = load_adapter(adapters_directory(), name, directory, model, pack)
    typer.echo(f"{name}: {format_bytes(known.num_bytes)} over {model}, in {known.directory}")


@commands.command(name="list")
def list_(
    as_json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of a table.")
    ] = False,
) -> None:
    """Lists the adapters that are there."""
    from expertstore.adapter_shelf import adapters_directory, list_adapters

    place = adapters_directory()
    found = list_adapters(place)
    if as_json:
        told = [
            {"name": each.name, "model": each.model, "num_bytes": each.num_bytes} for each in found
        ]
        typer.echo(json.dumps({"directory": str(place), "adapters": told}, indent=1))
        return
    if not found:
        typer.echo(f"{place} has no adapters; `expertd adapter load NAME DIR --base MODEL`.")
    for each in found:
        typer.echo(f"{each.name}: {format_bytes(each.num_bytes)} over {each.model}")


@commands.command()
def unload(name: Annotated[str, typer.Argument(metavar="NAME")]) -> None:
    """Removes an adapter; texts that are under way keep it to their end."""
    from expertstore.adapter_shelf import adapters_directory, unload_adapter

    unload_adapter(adapters_directory(), name)
    typer.echo(f"{name} is gone")
