"""``expertd record``."""

import signal
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertd.cli.admin import CALL_SECONDS, Socket
from expertstore.errors import ExpertdError, InvalidInputError
from expertstore.interrupts import interruptible

if TYPE_CHECKING:
    from expertd_client import ModelInfo
    from expertstore.trace import TraceModel

_SHOW_SECONDS = 1.0


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command()(record)


def record(
    socket: Socket,
    model: Annotated[str, typer.Option(metavar="NAME", help="The model to watch.")],
    output: Annotated[
        Path, typer.Option(metavar="TRACE.csv", readable=False, help="The file to write.")
    ],
    seconds: Annotated[
        float | None, typer.Option(metavar="N", help="How long; until Ctrl-C if not given.")
    ] = None,
) -> None:
    """Writes down which experts the workers of a model use: a trace for `expertd replay`.

    Needs root or the daemon's own user, and the file is readable by its owner alone: the experts
    that a text uses tell something about the text. The file is there when the recording is
    complete, also if it ended by Ctrl-C, with the model or with the daemon.

    Example: `expertd record --model mixtral --output t.csv --seconds 60`
    """
    from expertd.traces.recorder import TraceRecorder
    from expertd_client import Client
    from expertstore.trace import TraceWriter

    if seconds is not None and not 0 < seconds <= 1e9:
        raise InvalidInputError(f"--seconds is {seconds:g}; give how long to record.")
    failure: ExpertdError | None = None
    num_touches = num_lost = 0
    with (
        interruptible(),
        Client(socket, timeout_seconds=CALL_SECONDS) as daemon,
        TraceWriter(output, _trace_model(daemon.get_model(model))) as writer,
        daemon.watch_touches(model, timeout_seconds=seconds) as stream,
    ):
        recorder = TraceRecorder(writer.model, writer.write)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: stream.stop())
        _note(f"recording {model} {f'for {seconds:g} s' if seconds else 'until Ctrl-C'}")
        shown = time.monotonic()
        try:
            for batch in stream:
                if batch.num_lost:
                    num_lost += batch.num_lost
                    recorder.end(batch.session)
                    writer.write_gap(batch.session, batch.num_lost)
                recorder.take(batch.session, batch.entries)
                num_touches += len(batch.entries)
                if batch.ended:
                    recorder.forget(batch.session)
                if sys.stderr.isatty() and time.monotonic() - shown > _SHOW_SECONDS:
                    shown = time.monotonic()
                    typer.echo(
                        f"\r{num_touches} accesses, {writer.num_rows} rows ", nl=False, err=True
                    )
        except ExpertdError as error:  # what came until then is worth having
            failure = error
        recorder.finish()
        writer.commit()
    if num_lost:
        _note(
            f"{num_lost} accesses are missing, and marked as gaps: they came faster than they "
            "could be read."
        )
    _note(f"wrote {num_touches} accesses in {writer.num_rows} rows to {output}")
    if failure is not None:
        raise failure


def _trace_model(model: "ModelInfo") -> "TraceModel":
    from expertstore import __version__
    from expertstore.trace import TraceModel

    layers = [model.layers[number] for number in sorted(model.layers)]
    return TraceModel(
        tuple(layer.num_experts for layer in layers),
        tuple(layer.experts_per_token for layer in layers),
        tuple(layer.layer for layer in layers),
        {
            "model": f"{model.name}, {model.architecture}, {model.scheme}",
            "expert_bytes": str(model.record_bytes),
            "recorded_by": f"expertd {__version__}",
        },
    )


def _note(sentence: str) -> None:
    typer.echo(sentence, err=True)
