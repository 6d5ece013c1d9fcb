"""``expert-run generate``: continues one prompt, or all of a file."""

import gc
import signal
import sys
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

import expertd_inference
from expertd_inference.cli import options
from expertd_inference.cli.prompt_file import PromptLine
from expertd_inference.cli.prompts import lines_of
from expertd_inference.cli.text_output import TextOutput, status
from expertd_inference.engine.budget import EngineLimits
from expertd_inference.process.attachment import DEFAULT_REATTACH_SECONDS, attach
from expertd_inference.process.embedded import EmbeddedDaemon
from expertd_inference.process.environment import garbage_kept, prepare_environment
from expertd_inference.settings import (
    Activations,
    ComputeDtype,
    DeviceSettings,
    GenerationSettings,
    KernelsName,
)
from expertstore.adapter_shelf import named_adapter
from expertstore.errors import InvalidInputError, PreconditionError
from expertstore.interrupts import exit_code, importing, interruptible

if TYPE_CHECKING:
    import torch

    from expertd_inference.worker import Worker

_LIMITS = EngineLimits()


def generate(
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", help="The text to continue; - reads it from stdin."),
    ] = None,
    prompt_file: Annotated[
        Path | None,
        typer.Option(
            help="Many prompts, continued at once: one JSON object a line, with prompt, messages "
            "or tokens, and settings of its own; - reads stdin. The answer is a line for each, as "
            "it is done.",
            metavar="FILE",
            readable=False,
        ),
    ] = None,
    socket: options.Socket = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model that it serves; not needed if it is the only one."),
    ] = None,
    embedded: options.Embedded = None,
    ram: options.Ram = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    pack: options.Pack = None,
    cache: options.Cache = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Stop after so many tokens.")] = 128,
    temperature: Annotated[
        float, typer.Option(min=0, max=100, help="0 takes the likeliest token each time.")
    ] = 0.0,
    top_p: Annotated[
        float | None,
        typer.Option(
            help="Sample from the likeliest tokens of this total probability. Default: the "
            "checkpoint's, or all."
        ),
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Makes sampling repeatable.")] = None,
    chat: Annotated[
        bool, typer.Option("--chat", help="Answer the prompt in the model's chat template.")
    ] = False,
    image: Annotated[
        list[Path] | None,
        typer.Option(
            help="An image that the prompt is about, for a model that sees; may be repeated. The "
            "prompt is then a message of a chat.",
            metavar="FILE",
            readable=False,
        ),
    ] = None,
    json: Annotated[
        bool,
        typer.Option(
            "--json",
            help="Print one JSON object with text, tokens and figures; with --prompt-file, a last "
            "line with the figures of all.",
        ),
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="With --json: the text to stderr while it comes.")
    ] = False,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    kernels: options.Kernels = KernelsName.AUTO,
    exact: options.Exact = False,
    activations: options.ActivationsOption = Activations.BITS_16,
    max_sequences: Annotated[
        int, typer.Option(min=1, help="With --prompt-file: how many are computed together.")
    ] = _LIMITS.max_sequences,
    kv_tokens: options.KvTokens = None,
    adapter: options.AdapterOption = None,
    experts_per_token: options.ExpertsPerToken = None,
    expert_threshold: options.ExpertThreshold = None,
    device: options.Device = options.DEFAULTS.device,
    cache_bytes: options.CacheBytes = None,
    cache_policy: options.Policy = options.DEFAULTS.cache_policy,
    speculate_layers: options.SpeculateLayers = options.DEFAULTS.speculate_layers,
    speculate_experts: options.SpeculateExperts = options.DEFAULTS.speculate_experts,
    staging_slots: options.StagingSlots = options.DEFAULTS.staging_slots,
    on_miss: options.OnMissOption = options.DEFAULTS.on_miss,
    decode_graphs: options.DecodeGraphs = options.DEFAULTS.decode_graphs,
    reattach_seconds: options.ReattachSeconds = DEFAULT_REATTACH_SECONDS,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what transformers has to say.")
    ] = False,
) -> None:
    """Continue a prompt, and print the new text as it comes; or many, with --prompt-file.

    [bold]Examples[/bold]

      expert-run generate --model mixtral --prompt "Once upon a time"

      expert-run generate --embedded ./mixtral-pack --prompt "Once upon a time"

      expert-run generate --model mixtral --device cuda --cache-bytes 12GiB -p "Once upon"

      expert-run generate --model mixtral --chat --temperature 0.7 -p "Why is the sky blue?"

      expert-run generate --socket tcp://store.lab:7443 --tls-ca ca.pem --tls-cert me.pem
      --tls-key me.key --pack ./mixtral-trunk --prompt "Once upon a time"

      expert-run generate --model qwen3-vl --image photo.jpg -p "What is on this photo?"

      cat story.txt | expert-run generate --model mixtral --json -p -

      expert-run generate --model mixtral --prompt-file questions.jsonl > answers.jsonl
    """
    if stream and prompt_file is not None:
        raise InvalidInputError("--stream shows one text; with --prompt-file, leave it out.")
    settings = GenerationSettings(
        max_new_tokens, temperature, top_p, seed, adapter=named_adapter(adapter)
    )
    lines = lines_of(prompt, prompt_file, settings, chat=chat, images=image or ())
    limits = EngineLimits(
        max_sequences=max_sequences,
        max_waiting=max(_LIMITS.max_waiting, 2 * max_sequences),
        kv_tokens=kv_tokens,
        experts_per_token=experts_per_token,
        expert_threshold=expert_threshold,
    )
    options.check_places(ram, embedded=embedded)
    tls = options.tls_files(tls_ca, tls_cert, tls_key)
    copies_bytes = options.size_of("--cache", cache)
    devices = DeviceSettings(
        device,
        options.size_of("--cache-bytes", cache_bytes),
        cache_policy,
        speculate_layers,
        speculate_experts,
        staging_slots,
        on_miss,
        decode_graphs,
    )
    output = TextOutput(json=json or prompt_file is not None, stream=stream)
    with interruptible(), ExitStack() as stack:
        if embedded is not None:
            if model is not None:
                raise InvalidInputError("Choose one of --embedded and --model.")
            with status("Starting a daemon"):
                daemon = stack.enter_context(EmbeddedDaemon(embedded, ram=ram))
            socket, model, reattach_seconds = str(daemon.socket), daemon.name, 0
        attachment = stack.enter_context(attach(model, socket, tls=tls, cache_bytes=copies_bytes))
        prepare_environment(verbose=verbose, device=device)
        with garbage_kept():
            import_worker()
            if threads is not None:
                set_threads(threads)
            with status("Loading the model"):
                worker = stack.enter_context(
                    expertd_inference.Worker(
                        attachment,
                        pack=pack,
                        dtype=_torch_dtype(dtype),
                        kernels=kernels,
                        reattach_seconds=reattach_seconds,
                        device=devices,
                        say=output.say,
                        exact=exact,
                        activations=int(activations),
                        limits=limits,
                    )
                )
            # Modules and model stay to the end: no later collection need look at them.
            gc.freeze()
        with status("Preparing the engine"):
            engine = worker.engine
        if verbose or prompt_file is not None:
            output.say(f"executor {engine.executor}: {engine.reason}")
        if prompt_file is None:
            interrupted = _continue_one(worker, lines[0], output, json=json)
        else:
            from expertd_inference.cli.many import continue_many

            interrupted = continue_many(engine, lines, output, json=json)
    if interrupted:
        sys.exit(exit_code(signal.SIGINT))


def _continue_one(worker: "Worker", line: PromptLine, output: TextOutput, *, json: bool) -> bool:
    """Whether it was interrupted."""
    try:
        generation = expertd_inference.generate(
            worker,
            line.prompt,
            line.settings,
            images=line.images,
            on_text=output.write,
            measure_memory=json,
        )
    finally:
        output.end_line()
    output.end(msgspec.json.encode(generation.result) if json else None)
    return generation.interrupted


def import_worker() -> None:
    """Imports what computes. Raises PreconditionError where a part of it is not installed."""
    try:
        with importing("torch and transformers"):
            import_module("expertd_inference.generation")
    except ModuleNotFoundError as error:
        raise PreconditionError(
            f"this installation serves experts but cannot compute with them, for {error.name} is "
            "not installed: run it where `pip install expertd` brought its dependencies."
        ) from error


def set_threads(threads: int) -> None:
    """Of torch."""
    import torch

    torch.set_num_threads(threads)


def _torch_dtype(dtype: ComputeDtype | None) -> "torch.dtype | None":
    import torch

    return None if dtype is None else getattr(torch, dtype)
