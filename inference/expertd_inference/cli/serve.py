"""``expert-run serve``: an OpenAI-compatible server."""

import os
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Annotated

import typer

from expertd_inference.cli import options
from expertd_inference.cli.text_output import complain, status
from expertd_inference.engine.budget import EngineLimits
from expertd_inference.process.attachment import DEFAULT_REATTACH_SECONDS
from expertd_inference.process.embedded import EmbeddedDaemon
from expertd_inference.process.environment import garbage_kept, prepare_front
from expertd_inference.process.fork_server import start_imports
from expertd_inference.settings import Activations, DeviceSettings, KernelsName
from expertstore.errors import InvalidInputError
from expertstore.interrupts import interruptible

_LIMITS = EngineLimits()


def serve(
    socket: options.Socket = None,
    embedded: options.Embedded = None,
    ram: options.Ram = None,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[
        int, typer.Option(min=0, max=65535, help="The port to listen on; 0 takes a free one.")
    ] = 8080,
    preload: Annotated[
        list[str] | None,
        typer.Option(
            help="Load this model at the start; may be repeated. Default: on the first request, "
            "or at once if there is only one.",
            metavar="NAME",
        ),
    ] = None,
    alias: Annotated[
        list[str] | None,
        typer.Option(help="Serve a model under another name, too.", metavar="ALIAS=NAME"),
    ] = None,
    variants: Annotated[
        Path | None,
        typer.Option(
            help="A TOML file of models under names of their own with other defaults, such as a "
            "system prompt, a temperature, or thinking off.",
            metavar="FILE",
            readable=False,
        ),
    ] = None,
    idle_seconds: Annotated[
        float | None,
        typer.Option(
            min=0,
            help="End a model's engine after so long without requests; the next one starts it "
            "again. Default: never.",
        ),
    ] = None,
    chat_template: options.ChatTemplate = None,
    chat_format: Annotated[
        str | None,
        typer.Option(
            help="How answers have reasoning and calls of tools, such as hermes, deepseek or "
            "gpt-oss; plain for not at all. Default: by the chat template.",
            metavar="NAME",
        ),
    ] = None,
    request_templates: Annotated[
        bool,
        typer.Option(
            "--request-templates",
            help="Let requests bring a chat template (chat_template), which is a program: only for "
            "users whom you trust.",
        ),
    ] = False,
    images: Annotated[
        Path | None,
        typer.Option(
            help="Let requests name images by file: URLs, of files in this directory and below. "
            "Without it, images come as data: URLs.",
            metavar="DIR",
            readable=False,
            show_default=False,
        ),
    ] = None,
    drain_seconds: Annotated[
        int, typer.Option(min=0, help="At the end, wait so long for answers to be complete.")
    ] = 60,
    keys: Annotated[
        Path | None,
        typer.Option(
            help="Answer only requests with a key of this file; `expert-run key` makes entries.",
            metavar="FILE",
            readable=False,
            rich_help_panel=options.ACCESS,
        ),
    ] = None,
    no_auth: Annotated[
        bool,
        typer.Option(
            "--no-auth", help="Let anybody who reaches --host ask.", rich_help_panel=options.ACCESS
        ),
    ] = False,
    cors_origin: Annotated[
        list[str] | None,
        typer.Option(
            help="Let pages of this site ask, as in https://chat.lab; may be repeated, * is all.",
            metavar="ORIGIN",
            rich_help_panel=options.ACCESS,
        ),
    ] = None,
    https_cert: Annotated[
        Path | None,
        typer.Option(
            help="Serve HTTPS with this certificate.",
            metavar="PEM",
            readable=False,
            rich_help_panel=options.ACCESS,
        ),
    ] = None,
    https_key: Annotated[
        Path | None,
        typer.Option(
            help="Its private key.", metavar="PEM", readable=False, rich_help_panel=options.ACCESS
        ),
    ] = None,
    max_body: Annotated[
        str,
        typer.Option(
            help="The largest request, as in 32MiB; reading it takes many times the memory.",
            metavar="SIZE",
            rich_help_panel=options.ACCESS,
        ),
    ] = "8MiB",
    state: Annotated[
        Path | None,
        typer.Option(
            help="Where clients' files and batches are kept. Default: $STATE_DIRECTORY, as systemd "
            "sets it, else expert-run in $XDG_STATE_HOME.",
            metavar="DIR",
            readable=False,
        ),
    ] = None,
    tls_ca: options.TlsCa = None,
    tls_cert: options.TlsCert = None,
    tls_key: options.TlsKey = None,
    pack: options.Pack = None,
    cache: options.Cache = None,
    max_sequences: options.MaxSequences = _LIMITS.max_sequences,
    max_waiting: Annotated[
        int,
        typer.Option(
            min=1,
            help="How many more may wait; others are told to come later.",
            rich_help_panel=options.COMPUTING,
        ),
    ] = _LIMITS.max_waiting,
    kv_tokens: options.KvTokens = None,
    experts_per_token: options.ExpertsPerToken = None,
    expert_threshold: options.ExpertThreshold = None,
    dtype: options.Dtype = None,
    threads: options.Threads = None,
    kernels: options.Kernels = KernelsName.AUTO,
    exact: options.Exact = False,
    activations: options.ActivationsOption = Activations.BITS_16,
    device: Annotated[
        list[str] | None,
        typer.Option(
            help="Where to compute: cpu, a GPU as in cuda:0, or several with commas between them, "
            "which share the layers. Repeat it to have an engine on each. Default: cpu.",
            metavar="DEVICE",
        ),
    ] = None,
    engines: Annotated[
        int,
        typer.Option(min=1, help="On the CPU: so many engines of each model share the cores."),
    ] = 1,
    cache_bytes: options.CacheBytes = None,
    cache_policy: options.Policy = options.DEFAULTS.cache_policy,
    speculate_layers: options.SpeculateLayers = options.DEFAULTS.speculate_layers,
    speculate_experts: options.SpeculateExperts = options.DEFAULTS.speculate_experts,
    staging_slots: options.StagingSlots = options.DEFAULTS.staging_slots,
    on_miss: options.OnMissOption = options.DEFAULTS.on_miss,
    decode_graphs: options.DecodeGraphs = options.DEFAULTS.decode_graphs,
    reattach_seconds: options.ReattachSeconds = DEFAULT_REATTACH_SECONDS,
) -> None:
    """Serve models by OpenAI's interface, to any number of clients at once.

    The address that it prints has a chat for browsers, and /v1 for clients.

    [bold]Examples[/bold]

      expert-run serve --embedded ./mixtral-pack

      expert-run serve --preload mixtral --idle-seconds 600 --alias gpt-4o=mixtral

      expert-run serve --host 0.0.0.0 --keys keys.toml --https-cert cert.pem --https-key key.pem
    """
    options.check_places(ram, embedded=embedded, socket=socket)
    prepare_front()
    if all(one == options.DEFAULTS.device for one in device or ()):
        start_imports()
    with garbage_kept(), options.extra_serve("serve"):
        from expertd_inference.server.hosting.engine_child import EngineSpec
        from expertd_inference.server.hosting.replicas import replicas
        from expertd_inference.server.serve import ServerSettings, run_server
    settings = ServerSettings(
        host=host,
        port=port,
        preload=tuple(preload or ()),
        aliases=_aliases(alias or []),
        variants=variants,
        chat_template=chat_template,
        chat_format=chat_format,
        request_templates=request_templates,
        images=images,
        idle_seconds=idle_seconds,
        drain_seconds=drain_seconds,
        keys=keys,
        no_auth=no_auth,
        cors_origins=tuple(cors_origin or ()),
        https_cert=https_cert,
        https_key=https_key,
        max_body_bytes=options.size_of("--max-body", max_body) or 0,
        state=state or _default_state(),
        is_embedded=embedded is not None,
    )
    places = device or [options.DEFAULTS.device]
    on_device = DeviceSettings(
        places[0],
        options.size_of("--cache-bytes", cache_bytes),
        cache_policy,
        speculate_layers,
        speculate_experts,
        staging_slots,
        on_miss,
        decode_graphs,
    )
    with interruptible(), ExitStack() as stack:
        if embedded is not None:
            with status("Starting a daemon"):
                daemon = stack.enter_context(EmbeddedDaemon(embedded, ram=ram))
            socket = str(daemon.socket)
        spec = EngineSpec(
            model="",
            socket=socket,
            tls=options.tls_files(tls_ca, tls_cert, tls_key),
            pack=pack,
            copies_bytes=options.size_of("--cache", cache),
            device=on_device,
            dtype=dtype,
            kernels=kernels,
            exact=exact,
            activations=int(activations),
            threads=threads,
            limits=EngineLimits(
                max_sequences=max_sequences,
                max_waiting=max_waiting,
                kv_tokens=kv_tokens,
                experts_per_token=experts_per_token,
                expert_threshold=expert_threshold,
            ),
            reattach_seconds=reattach_seconds,
        )
        run_server(settings, replicas(spec, places, engines), complain)


def _default_state() -> Path | None:
    if given := os.environ.get("STATE_DIRECTORY"):
        return Path(given)
    if home := os.environ.get("XDG_STATE_HOME"):
        return Path(home) / "expert-run"
    with suppress(RuntimeError):  # A user without a home keeps nothing.
        return Path.home() / ".local/state/expert-run"
    return None


def _aliases(pairs: list[str]) -> dict[str, str]:
    aliases = {}
    for pair in pairs:
        alias, found, name = pair.partition("=")
        if not (found and alias and name):
            raise InvalidInputError(f"--alias {pair!r} is not ALIAS=NAME.")
        aliases[alias] = name
    return aliases
