"""All commands of ``expert-run``.

torch and transformers are imported only once the arguments are right and the daemon has
answered, so help and most refusals come at once.
"""

import errno
import gc
import signal
import sys
from collections.abc import Callable
from contextlib import ExitStack
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NoReturn

import msgspec
import typer

import expertd_inference
import expertstore
from expertd_client import TlsFiles
from expertd_inference.cli import options
from expertd_inference.cli.advise import advise
from expertd_inference.cli.text_output import TextOutput, complain, discard, prepare_streams, status
from expertd_inference.process.attachment import (
    DEFAULT_REATTACH_SECONDS,
    ModelAttachment,
    attach,
)
from expertd_inference.process.embedded import EmbeddedDaemon
from expertd_inference.process.environment import garbage_kept, prepare_environment
from expertd_inference.settings import (
    ComputeDtype,
    DeviceSettings,
    GenerationSettings,
    KernelsName,
    check_prompt,
)
from expertstore.errors import ExpertdError, InvalidInputError, PreconditionError
from expertstore.interrupts import exit_code, importing, interruptible

if TYPE_CHECKING:
    from expertd_inference.worker import Worker

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


app.command()(advise)


@app.command()
def generate(
    prompt: Annotated[
        str, typer.Option("--prompt", "-p", help="The text to continue; - reads it from stdin.")
    ],
    socket: Annotated[
        str | None,
        typer.Option(
            help="The directory that the daemon serves in, or tcp://HOST:PORT. Default: "
            "$XDG_RUNTIME_DIR/expertd if a daemon of yours is there, else /run/expertd.",
            metavar="DIR",
        ),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="A model that it serves; not needed if it is the only one."),
    ] = None,
    embedded: Annotated[
        Path | None,
        typer.Option(
            help="Without a daemon: start one for this pack, and stop it at the end.",
            metavar="PACK",
            readable=False,
        ),
    ] = None,
    ram: Annotated[
        str | None,
        typer.Option(
            help="With --embedded: memory for experts, as in 8GiB. Default: all of "
            "them, or half of the free memory.",
            metavar="SIZE",
        ),
    ] = None,
    tls_ca: Annotated[
        Path | None,
        typer.Option(
            help="With tcp://: who signed the daemon's certificate.", metavar="PEM", readable=False
        ),
    ] = None,
    tls_cert: Annotated[
        Path | None,
        typer.Option(help="With tcp://: this client's certificate.", metavar="PEM", readable=False),
    ] = None,
    tls_key: Annotated[
        Path | None,
        typer.Option(help="With tcp://: its private key.", metavar="PEM", readable=False),
    ] = None,
    pack: Annotated[
        Path | None,
        typer.Option(
            help="With tcp://: this host's copy of the pack, whose experts-* may be left out.",
            metavar="PACK",
            readable=False,
        ),
    ] = None,
    cache: Annotated[
        str | None,
        typer.Option(
            help="Where the daemon's memory cannot be shared: memory for copies of experts, as in "
            "8GiB. Default: all of them, or half of the free memory.",
            metavar="SIZE",
        ),
    ] = None,
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
    json: Annotated[
        bool, typer.Option("--json", help="Print one JSON object with text, tokens and figures.")
    ] = False,
    stream: Annotated[
        bool, typer.Option("--stream", help="With --json: the text to stderr while it comes.")
    ] = False,
    dtype: Annotated[
        ComputeDtype | None,
        typer.Option(help="Compute in this. Default: what the checkpoint is in."),
    ] = None,
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads to compute with. Default: all cores.")
    ] = None,
    kernels: Annotated[
        KernelsName,
        typer.Option(
            help="What computes on the CPU. auto: native, but for packs of 16-bit experts, whose "
            "reference gives the very tokens of stock transformers."
        ),
    ] = KernelsName.AUTO,
    device: options.Device = options.DEFAULTS.device,
    cache_bytes: options.CacheBytes = None,
    cache_policy: options.Policy = options.DEFAULTS.cache_policy,
    speculate_layers: options.SpeculateLayers = options.DEFAULTS.speculate_layers,
    speculate_experts: options.SpeculateExperts = options.DEFAULTS.speculate_experts,
    staging_slots: options.StagingSlots = options.DEFAULTS.staging_slots,
    on_miss: options.OnMissOption = options.DEFAULTS.on_miss,
    decode_graphs: options.DecodeGraphs = options.DEFAULTS.decode_graphs,
    reattach_seconds: Annotated[
        float, typer.Option(min=0, help="Wait so long for a new daemon if this one ends.")
    ] = DEFAULT_REATTACH_SECONDS,
    verbose: Annotated[
        bool, typer.Option("--verbose", "-v", help="Show what transformers has to say.")
    ] = False,
) -> None:
    """Continue a prompt, and print the new text as it comes.

    [bold]Examples[/bold]

      expert-run generate --model mixtral --prompt "Once upon a time"

      expert-run generate --embedded ./mixtral-pack --prompt "Once upon a time"

      expert-run generate --model mixtral --device cuda --cache-bytes 12GiB -p "Once upon"

      expert-run generate --model mixtral --chat --temperature 0.7 -p "Why is the sky blue?"

      expert-run generate --socket tcp://store.lab:7443 --tls-ca ca.pem --tls-cert me.pem
      --tls-key me.key --pack ./mixtral-trunk --prompt "Once upon a time"

      cat story.txt | expert-run generate --model mixtral --json -p -
    """
    settings = GenerationSettings(max_new_tokens, temperature, top_p, seed)
    text = _read_stdin() if prompt == "-" else prompt
    check_prompt(text)
    if embedded is None and ram is not None:
        raise InvalidInputError("--ram belongs to --embedded; a running daemon has its budget.")
    tls = _tls_files(tls_ca, tls_cert, tls_key)
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
    output = TextOutput(json=json, stream=stream)
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
            _import_worker()
            with status("Loading the model"):
                worker = stack.enter_context(
                    _load(
                        attachment,
                        pack,
                        dtype,
                        threads,
                        kernels,
                        devices,
                        reattach_seconds,
                        output.say,
                    )
                )
            # Modules and model stay to the end: no later collection need look at them.
            gc.freeze()
        try:
            generation = expertd_inference.generate(
                worker, text, settings, chat=chat, on_text=output.write, measure_memory=json
            )
        finally:
            output.end_line()
    output.end(msgspec.json.encode(generation.result) if json else None)
    if generation.interrupted:
        sys.exit(exit_code(signal.SIGINT))


def _tls_files(ca: Path | None, certificate: Path | None, key: Path | None) -> TlsFiles | None:
    if ca is None and certificate is None and key is None:
        return None
    if ca is None or certificate is None or key is None:
        raise InvalidInputError("--tls-ca, --tls-cert and --tls-key belong together; give all.")
    return TlsFiles(ca, certificate, key)


def _read_stdin() -> str:
    """The prompt from a pipe. Raises InvalidInputError if it is not text or cannot be read."""
    try:
        return sys.stdin.buffer.read().decode()
    except OSError as error:
        raise InvalidInputError(
            f"The prompt cannot be read from stdin: {error.strerror}."
        ) from error
    except UnicodeDecodeError as error:
        raise InvalidInputError(f"The prompt on stdin is not UTF-8 text: {error}.") from error


def _import_worker() -> None:
    try:
        with importing("torch and transformers"):
            import_module("expertd_inference.engine.generation")
    except ModuleNotFoundError as error:
        raise PreconditionError(
            f"this installation serves experts but cannot compute with them, for {error.name} is "
            "not installed: run it where `pip install expertd` brought its dependencies."
        ) from error


def _load(
    attachment: ModelAttachment,
    pack: Path | None,
    dtype: ComputeDtype | None,
    threads: int | None,
    kernels: KernelsName,
    devices: DeviceSettings,
    reattach_seconds: float,
    say: Callable[[str], None],
) -> "Worker":
    import torch

    import expertd_inference.worker

    if threads is not None:
        torch.set_num_threads(threads)
    return expertd_inference.worker.Worker(
        attachment,
        pack=pack,
        dtype=None if dtype is None else getattr(torch, dtype),
        kernels=kernels,
        reattach_seconds=reattach_seconds,
        device=devices,
        say=say,
    )
