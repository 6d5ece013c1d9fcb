"""``expert-run trace``: which experts texts use, token by token, and how much each adds."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

import expertd_inference
import expertstore
from expertd_inference.cli import options
from expertd_inference.cli.generate import import_worker, set_threads
from expertd_inference.cli.prompt_file import PromptLine, read_prompt_file
from expertd_inference.cli.text_output import complain, progress, status
from expertd_inference.process.attachment import attach
from expertd_inference.process.embedded import EmbeddedDaemon
from expertd_inference.process.environment import garbage_kept, prepare_environment
from expertd_inference.settings import GenerationSettings
from expertstore.errors import InvalidInputError
from expertstore.interrupts import interruptible
from expertstore.trace import Phase, Row, TraceModel, TraceWriter

if TYPE_CHECKING:
    from expertd_inference.worker import Worker


def trace(
    prompt_file: Annotated[
        Path,
        typer.Argument(
            metavar="TEXTS.jsonl",
            help="One JSON object a line, with prompt, messages or tokens; - reads stdin.",
            readable=False,
        ),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="TRACE.csv", help="The file to write.", readable=False)
    ],
    socket: options.Socket = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model that it serves; not needed if it is the only one."),
    ] = None,
    embedded: options.Embedded = None,
    ram: options.Ram = None,
    threads: options.Threads = None,
) -> None:
    """Write down which experts texts use, and how much each adds to a token.

    The trace is for `expertd pack --prune`, and for `expertd replay`. Nothing is generated; a text
    is cut where the model's context ends. The file is readable by its owner alone.

    [bold]Examples[/bold]

      expert-run trace texts.jsonl trace.csv --embedded ./mixtral-pack
    """
    lines = read_prompt_file(prompt_file, GenerationSettings())
    options.check_places(ram, embedded=embedded)
    if embedded is not None and model is not None:
        raise InvalidInputError("Choose one of --embedded and --model.")
    with interruptible(), ExitStack() as stack:
        if embedded is not None:
            with status("Starting a daemon"):
                daemon = stack.enter_context(EmbeddedDaemon(embedded, ram=ram))
            socket, model = str(daemon.socket), daemon.name
        attachment = stack.enter_context(attach(model, socket))
        prepare_environment(device=options.DEFAULTS.device)
        with garbage_kept(), status("Loading the model"):
            import_worker()
            if threads is not None:
                set_threads(threads)
            worker = stack.enter_context(expertd_inference.Worker(attachment, say=complain))
        writer = stack.enter_context(TraceWriter(output, _model_of(worker)))
        num_tokens = 0
        with progress(len(lines)) as advance:
            for line in lines:
                num_tokens += _write(worker, line, num_tokens, writer)
                advance(f"{num_tokens} tokens")
        writer.commit()
    complain(f"wrote {num_tokens} tokens of {len(lines)} texts to {output}")


def _model_of(worker: "Worker") -> TraceModel:
    manifest, layers = worker.manifest, worker.manifest.layers
    return TraceModel(
        tuple(layer.num_experts for layer in layers),
        tuple(layer.experts_per_token for layer in layers),
        tuple(layer.layer for layer in layers),
        {
            "model": f"{worker.session.model.name}, {manifest.architecture}, {manifest.scheme}",
            "recorded_by": f"expert-run {expertstore.__version__}",
        },
        weighted=True,
    )


def _write(worker: "Worker", line: PromptLine, step: int, writer: TraceWriter) -> int:
    """The rows of one text, whose first token is ``step``; how many tokens it has."""
    import torch

    from expertd_inference.experts.tracing import traced

    prompt = line.prompt
    is_tokens = isinstance(prompt, list) and all(isinstance(one, int) for one in prompt)
    tokens = prompt if is_tokens else worker.encode(prompt)  # type: ignore[arg-type]
    tokens = tokens[: worker.context_tokens]
    if not tokens or not all(isinstance(x, int) and 0 <= x < worker.vocabulary for x in tokens):
        raise InvalidInputError(
            f"Line {line.number} has no tokens, or some that the model has not; leave it out."
        )
    ids = torch.tensor([tokens])
    with torch.no_grad():
        layers = traced(worker.model, lambda: worker.model(ids, use_cache=False))
    places = {layer: place for place, layer in enumerate(writer.model.layer_ids)}
    found = [
        (places[each.layer], each.experts.tolist(), each.added.tolist())
        for each in sorted(layers, key=lambda each: each.layer)
    ]
    for token in range(len(tokens)):
        for place, experts, added in found:
            num = writer.model.num_experts[place]
            used = [
                pair for pair in zip(experts[token], added[token], strict=True) if pair[0] < num
            ]
            if used:
                chosen, weights = zip(*used, strict=True)
                writer.write(Row(Phase.PREFILL, step + token, place, chosen, 0, weights))
    return len(tokens)
