"""``expertd deploy-files``: the files of deploy/, out of an installed package."""

from pathlib import Path
from typing import Annotated

import typer

from expertstore.errors import InvalidInputError

PACKAGE = Path(__file__).parents[1]


def register(app: typer.Typer) -> None:
    """Adds the command."""
    app.command("deploy-files")(deploy_files)


def deploy_files(
    directory: Annotated[
        Path,
        typer.Argument(
            help="Where to write them; made if it is not there.", metavar="DIR", readable=False
        ),
    ],
    force: Annotated[bool, typer.Option("--force", help="Replace files that are there.")] = False,
) -> None:
    """Write out what a host needs to run expertd as a service.

    Units and settings for systemd, the container recipe, Prometheus' alert rules and Grafana's
    dashboard. docs/install.md says where each belongs.
    """
    source = files_of_deploy()
    found = sorted(file for file in source.rglob("*") if file.is_file() and file.name != "check")
    targets = {file: directory / file.relative_to(source) for file in found}
    try:
        there = [target for target in targets.values() if target.exists()]
        if there and not force:
            raise InvalidInputError(
                f"{there[0]} is there already; name another directory, or give --force to "
                "replace it."
            )
        for file, target in targets.items():
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(file.read_bytes())
    except OSError as error:
        raise InvalidInputError(f"{error.filename} cannot be written: {error.strerror}.") from error
    for target in targets.values():
        typer.echo(str(target))


def files_of_deploy() -> Path:
    """The folder: the package's own, or the checkout's. Raises InvalidInputError without one."""
    for folder in (PACKAGE / "deploy", PACKAGE.parents[1] / "deploy"):
        if (folder / "systemd/expertd.service").is_file():
            return folder
    raise InvalidInputError(
        f"{PACKAGE} was installed without the files of deploy/; install expertd again from a "
        "wheel or a checkout that has them."
    )
