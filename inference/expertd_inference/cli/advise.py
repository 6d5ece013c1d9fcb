"""``expert-run advise``: does this serve my host and my model?"""

import sys
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console

from expertd_inference.advice.named import find_named
from expertd_inference.cli import options
from expertd_inference.cli.text_output import status
from expertd_inference.process.environment import garbage_kept, prepare_environment
from expertstore.errors import InvalidInputError, PreconditionError
from expertstore.interrupts import importing, interruptible


def advise(
    model: Annotated[
        str | None,
        typer.Option(
            help="A shape such as mixtral-8x7b, a checkpoint's directory (its config.json is "
            "enough), or a pack. Default: all shapes, of which those that fit are listed.",
            metavar="SHAPE|DIR",
        ),
    ] = None,
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            help="Where packs are to lie: the disk to measure. Default: the pack's, or here.",
            metavar="DIR",
            readable=False,
        ),
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(
            help="Memory for experts, as in 24GiB. Default: all of them, half, and a quarter.",
            metavar="SIZE",
        ),
    ] = None,
    gpu_memory: Annotated[
        str | None,
        typer.Option(
            help="GPU memory to plan with, as in 12GiB. Default: what is free, if there is one.",
            metavar="SIZE",
        ),
    ] = None,
    link_rate: Annotated[
        str | None,
        typer.Option(
            help="Bytes per second from host to GPU, as in 25GB, for a GPU that is not here.",
            metavar="RATE",
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Workers that generate at once.")] = 1,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads of each. Default: all cores.")
    ] = None,
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object instead of the table.")
    ] = False,
) -> None:
    """Predict tokens per second and RAM of a model on this host, for each scheme and budget.

    Nothing is downloaded. Some seconds of measuring (memory, disk, the kernels on the model's own
    shapes, a daemon with a narrow twin of the model) tell what to expect, and one sentence which
    scheme to choose.

    [bold]Examples[/bold]

      expert-run advise

      expert-run advise --model mixtral-8x7b

      expert-run advise --model ./Qwen3-30B-A3B --ram 8GiB --dir /var/lib/expertd

      expert-run advise --model ./mixtral-pack --workers 4 --threads 2 --json

      expert-run advise --model gpt-oss-120b --gpu-memory 16GiB --link-rate 25GB
    """
    sizes = {
        name: options.size_of(name, value)
        for name, value in (
            ("--ram", ram),
            ("--gpu-memory", gpu_memory),
            ("--link-rate", link_rate),
        )
    }
    if model is not None:
        find_named(model)
    elif sizes["--gpu-memory"] is not None or sizes["--link-rate"] is not None:
        raise InvalidInputError("--gpu-memory and --link-rate belong to one --model; name it.")
    # Whether there is a GPU is yet to be found out.
    prepare_environment(device="cuda")
    try:
        with garbage_kept(), importing("torch and transformers"):
            from expertd_inference.advice import advisor, models, report
    except ModuleNotFoundError as error:
        raise PreconditionError(
            f"this installation cannot compute, for {error.name} is not installed: run it "
            "where `pip install expertd` brought its dependencies."
        ) from error
    question = advisor.Question(
        directory,
        sizes["--ram"],
        sizes["--gpu-memory"],
        sizes["--link-rate"],
        workers,
        threads,
    )
    console = Console(width=None if sys.stdout.isatty() else 120)
    if model is None:
        from expertd_inference.advice.survey import survey

        with interruptible(), status("Measuring this host for all known models"):
            found = survey(question, _say)
        if json:
            _print_json(report.survey_as_json(found))
        else:
            report.show_survey(found, console)
        return
    with interruptible(), status(f"Measuring this host for {model}"):
        advice = advisor.advise(models.find_model(model), question, _say)
    if json:
        _print_json(report.as_json(advice))
    else:
        report.show(advice, console)


def _print_json(found: dict[str, Any]) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(found) + b"\n")
    sys.stdout.buffer.flush()


def _say(message: str) -> None:
    sys.stderr.write(f"expert-run: {message}\n")
    sys.stderr.flush()
