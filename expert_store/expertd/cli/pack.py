"""``expertd pack``: from a checkpoint, here or on a hub, to a pack."""

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from expertd.cli.progress import ProgressDisplay
from expertd.traces.usage import PruneBy
from expertstore.command_line import serve_command
from expertstore.errors import ConfigError, InvalidInputError, PreconditionError
from expertstore.interrupts import importing, interruptible
from expertstore.sizes import format_bytes, parse_bytes, size_to_give
from expertstore.socket_directory import where_to_serve

if TYPE_CHECKING:
    from expertstore.pack.table import TableEncoding


def register(app: typer.Typer) -> None:
    """Adds the command to ``app``."""
    app.command()(pack)


def pack(
    source: Annotated[
        str,
        typer.Argument(
            metavar="CHECKPOINT",
            help="Directory of the model in Hugging Face's form (config.json and safetensors); a "
            "file in GGUF, or any part of one that is split; or "
            "its name on a hub: ORG/NAME, hf://ORG/NAME@REVISION, ms://ORG/NAME (ModelScope), of "
            "GGUF ORG/NAME:Q4_K_M or hf://ORG/NAME/FILE.gguf.",
        ),
    ],
    destination: Annotated[
        Path | None,
        typer.Argument(
            metavar="PACK",
            readable=False,
            help="Directory to make; its parent must exist. Default: MODEL, or MODEL-SCHEME with "
            "--scheme, where `expertd packs` looks.",
            show_default=False,
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="bf16, 8bit, 4bit, 4bit-fast, as-is, paper-3bit or paper-2bit: see above. 4bit "
            "unless given; as-is for a checkpoint that is quantized already.",
            show_default=False,
        ),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="PRECISION",
            help="Precision of the experts in place of the scheme's: 16, as-is, or bits and group "
            "size like 3g64; 2g16m has 8-bit scales.",
            show_default=False,
        ),
    ] = None,
    attention: Annotated[
        str | None,
        typer.Option(
            metavar="PRECISION",
            help="The same for the attention's linear layers.",
            show_default=False,
        ),
    ] = None,
    dense: Annotated[
        str | None,
        typer.Option(
            metavar="PRECISION",
            help="The same for dense layers and shared experts.",
            show_default=False,
        ),
    ] = None,
    head: Annotated[
        str | None,
        typer.Option(
            metavar="PRECISION",
            help="The same for the output head, unless it is tied to the embeddings.",
            show_default=False,
        ),
    ] = None,
    vision: Annotated[
        str | None,
        typer.Option(
            metavar="PRECISION",
            help="The same for the vision part of a model that sees; 16 in all schemes.",
            show_default=False,
        ),
    ] = None,
    text_only: Annotated[
        bool,
        typer.Option(
            "--text-only",
            help="Of a model that sees: leave its vision part out.",
        ),
    ] = False,
    tables: Annotated[
        str,
        typer.Option(
            metavar="BITS",
            help="Rows of tables (n-gram and per-layer embeddings) in 16, 8 or 4 bits.",
        ),
    ] = "16",
    table_min: Annotated[
        str,
        typer.Option(
            metavar="SIZE",
            help="Such embeddings get a file of their own, of which the daemon reads rows, if they "
            "have that size in 16 bits; smaller ones stay in the trunk.",
        ),
    ] = "256MiB",
    optimize: Annotated[
        bool,
        typer.Option(
            help="Let HQQ's solver place the zeros: a smaller error in 2 to 3 times the time."
        ),
    ] = True,
    device: Annotated[
        str,
        typer.Option(
            metavar="DEVICE",
            help="Where to quantize: cpu, cuda or cuda:N. The CPU is often as fast.",
        ),
    ] = "cpu",
    force: Annotated[
        bool,
        typer.Option(
            "--force",
            help="Replace the pack that is there once the new is whole; and pack weights that are "
            "not finite, which are named.",
        ),
    ] = False,
    keep: Annotated[
        bool,
        typer.Option(
            "--keep",
            help="Of a model on a hub: leave its files in the hub's cache on this host; else they "
            "go as they are packed.",
        ),
    ] = False,
    base: Annotated[
        Path | None,
        typer.Option(
            metavar="PACK",
            readable=False,
            help="Of a fine-tune of what this pack was made of, by the same scheme: keep only the "
            "experts that differ, and share the others' files.",
        ),
    ] = None,
    prune: Annotated[
        Path | None,
        typer.Option(
            metavar="TRACE",
            readable=False,
            help="Of a pack in the place of CHECKPOINT: make one of the experts that this trace of "
            "`expertd record` or `expert-run trace` says are used most.",
        ),
    ] = None,
    keep_experts: Annotated[
        float | None,
        typer.Option(
            min=0, max=1, metavar="SHARE", help="With --prune: of the experts of every layer."
        ),
    ] = None,
    prune_by: Annotated[
        PruneBy | None,
        typer.Option(
            help="With --prune: how often experts were used, or how much they added to tokens. "
            "Default: activation, if the trace has it.",
        ),
    ] = None,
) -> None:
    """Makes a pack of a checkpoint: quantized expert by expert, ready to serve.

    Schemes, with bits per expert weight (scales included):

    - `bf16` (16): nothing is quantized. Weights keep the checkpoint's own 16-bit type; those of
    a float32 checkpoint become bfloat16.

    - `8bit` (8.25), `4bit` (4.5): experts, attention, dense layers and shared experts, in groups
    of 128 and 64. `4bit-fast` is `4bit` with the output head in 8 bits.

    - `as-is`: weights that come quantized, as GPT-OSS does in MXFP4, stay bit for bit what they
    are. Other schemes make of them what they make of any weights. `--experts as-is` keeps those of
    the experts.

    - `paper-3bit` (3.26), `paper-2bit` (3.03): experts in 3 bits (groups of 64) or 2 bits
    (groups of 16), attention in 4, scales in 8; as in arXiv 2312.17238.

    Embeddings, routers and norms always have 16 bits, and so has a matrix of the trunk whose
    sizes do not fit. The vision part of a model that sees is packed in 16 bits, unless `--vision`
    says otherwise.

    A few experts are in memory at a time. After an interruption, even a hard one, the same command
    goes on where it was; the work lies in PACK.partial until the pack is whole.

    Of a model on a hub, a few files are on the disk at a time: each is fetched, checked, packed
    and removed. HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE work as in huggingface_hub.

    Example: `expertd pack Qwen/Qwen3-30B-A3B`

    Example: `expertd pack ~/models/Mixtral-8x7B-v0.1 /packs/mixtral --scheme 4bit`

    Example: `expertd pack /packs/qwen /packs/qwen-96 --prune trace.csv --keep-experts 0.75`
    """
    from expertd.cli.fetching import FetchMeter, advised_scheme, look_at, needs
    from expertd.hub.reference import parse_reference
    from expertd.packing.default_scheme import default_scheme
    from expertd.packing.early import GGUF_FOLDER, check_destination, check_early, partial_of
    from expertd.packing.gguf.names import gguf_of, model_name
    from expertd.packing.schemes import choose_scheme
    from expertstore.pack.files import check_path
    from expertstore.pack.place import packs_directory

    if prune is not None:
        of_scheme = (scheme, experts, attention, dense, head)
        if keep_experts is None or destination is None or any(of_scheme):
            raise InvalidInputError(
                "--prune takes a pack, the pack to make, and --keep-experts SHARE; weights stay as "
                "they are, so leave out schemes and precisions."
            )
        _prune(Path(source), destination.absolute(), prune, keep_experts, prune_by, force=force)
        return
    if keep_experts is not None or prune_by is not None:
        raise InvalidInputError("--keep-experts and --prune-by belong to --prune TRACE.")
    rows, smallest = _table_encoding(tables), _table_size(table_min)
    if base is not None:
        base = _base_of(base, destination)
    checkpoint = Path(source)
    reference = None if checkpoint.exists() else parse_reference(source)
    gguf = None if reference else gguf_of(checkpoint)
    if destination is None:
        name = reference.model if reference else checkpoint.resolve().name
        name = name if gguf is None else model_name(gguf.absolute())
        destination = packs_directory() / (f"{name}-{scheme}" if scheme else name)
        destination.parent.mkdir(parents=True, exist_ok=True)
    check_path(destination.absolute())
    shards, meter, why = None, FetchMeter(), ""
    with ExitStack() as stack:
        if reference is not None:
            _check_installed("torch", "transformers", "huggingface_hub")
            check_destination(destination.absolute(), force=force)
            checkpoint, shards = look_at(reference, destination.absolute(), meter, stack, keep=keep)
            gguf = gguf_of(checkpoint)
            if scheme is None and gguf is None:
                scheme, why = advised_scheme(checkpoint, destination.absolute())
        title = f"packing {reference or (gguf or checkpoint).name}"
        if gguf is not None:
            _check_installed("torch", "transformers", "gguf")
            check_destination(destination.absolute(), force=force)
            from expertd.packing.gguf.folder import unfold

            checkpoint = partial_of(destination.absolute()) / GGUF_FOLDER
            unfold(gguf, checkpoint)
        scheme = scheme or default_scheme(checkpoint)
        chosen = choose_scheme(scheme, experts, attention, dense, head, vision)
        check_early(
            checkpoint,
            destination,
            chosen,
            force=force,
            beside_bytes=shards.most_bytes if shards else 0,
        )
        # torch takes seconds to import: only once the arguments are known to be good.
        _check_installed("torch", "transformers")
        for sentence in (why, needs(shards, chosen) if shards else ""):
            if sentence:
                typer.echo(sentence, err=True)
        title += f" as {chosen.name}"
        typer.echo(title, err=True)
        _import_quietly()
        if gguf is not None:
            from expertd.packing.gguf.model_file import read_model
            from expertd.packing.gguf.tokenizer import write_tokenizer

            write_tokenizer(read_model(gguf), checkpoint)
        from expertd.packing.packer import Progress, Request
        from expertd.packing.packer import pack as make_pack

        request = Request(
            checkpoint,
            destination.absolute(),
            chosen,
            tables=rows,
            table_bytes=smallest,
            optimize=optimize,
            device=device,
            force=force,
            text_only=text_only,
            shards=shards,
        )
        with interruptible(), ProgressDisplay(title) as display:
            progress = Progress(0, 0, 0, 0, 0)

            def show(latest: Progress | None = None) -> None:
                nonlocal progress
                progress = latest or progress
                text = f"{progress.done_steps} of {progress.total_steps} tensors and experts"
                if shards is None or not shards.wanted_bytes:
                    display.update(
                        progress.done_bytes,
                        progress.total_bytes,
                        text,
                        skipped=progress.resumed_bytes,
                    )
                else:  # what takes the time is the network, or as long as it
                    display.update(meter.num_bytes, shards.wanted_bytes, text)

            meter.on_change = show
            try:
                make_pack(request, on_progress=show, on_notice=display.note)
            except KeyboardInterrupt:
                display.note("Interrupted; the same command goes on where it was.")
                raise
    if base is not None:
        _share(destination, base)
    _say_what_it_is(destination)


def _base_of(base: Path, destination: Path | None) -> Path:
    """The pack of that name or path. Raises PackError if it cannot be shared with."""
    from expertd.packing.sharing import check_shareable
    from expertstore.pack.place import named_pack, packs_directory

    found = named_pack(base).absolute()
    check_shareable(found, destination.absolute() if destination else packs_directory() / "new")
    return found


def _share(destination: Path, base: Path) -> None:
    from expertd.packing.sharing import share_with

    shared = share_with(destination, base)
    trunk = "the trunk too" if shared.shares_trunk else "the trunk is its own"
    typer.echo(
        f"{shared.num_shared} experts are {base.name}'s, {shared.num_own} differ; {trunk}.",
        err=True,
    )


def _prune(
    source: Path,
    destination: Path,
    trace: Path,
    share: float,
    by: PruneBy | None,
    *,
    force: bool,
) -> None:
    from expertd.traces.usage import read_usage
    from expertstore.pack.manifest import read_manifest
    from expertstore.pack.place import named_pack

    source = named_pack(source)
    read_manifest(source)
    usage = read_usage(trace, by)
    _check_installed("torch", "transformers")
    _import_quietly()
    from expertd.packing.pruning import prune

    title = f"pruning {source.name}"
    with interruptible(), ProgressDisplay(title) as display:
        prune(
            source,
            destination,
            usage,
            share,
            force=force,
            on_progress=lambda done, total: display.update(done, total, "of the experts kept"),
        )
    _say_what_it_is(destination)


def _say_what_it_is(destination: Path) -> None:
    from expertd.settings.config import name_of_pack
    from expertstore.pack.inspect import inspect as inspect_pack
    from expertstore.shared.host_memory import default_ram_bytes

    found = inspect_pack(destination)
    manifest = found.manifest
    rows_too = f", {format_bytes(manifest.table_bytes)} of tables" if manifest.tables else ""
    typer.echo(
        f"{destination}: {manifest.num_experts} experts, {format_bytes(manifest.expert_bytes)} at "
        f"{found.expert_bits:.2f} bits per weight{rows_too}, and "
        f"{format_bytes(manifest.trunk.num_bytes)} of trunk. The least RAM to serve it "
        f"(one token's experts) is {size_to_give(manifest.working_set_bytes)}."
    )
    name = name_of_pack(destination.absolute())
    budget = default_ram_bytes(manifest)
    typer.echo(f"Next: {serve_command(name, destination, budget, *where_to_serve())}")


def _table_encoding(bits: str) -> "TableEncoding":
    from expertstore.pack.table import TableEncoding

    known = {"16": TableEncoding.PLAIN, "8": TableEncoding.INT8, "4": TableEncoding.INT4}
    if bits not in known:
        raise ConfigError(f"--tables {bits} is none of 16, 8 and 4.")
    return known[bits]


def _table_size(text: str) -> int:
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--table-min: {error}.") from error


def _check_installed(*names: str) -> None:
    """Raises :class:`PreconditionError` where only what the daemon needs is installed."""
    import importlib.util

    for name in names:
        try:
            found = importlib.util.find_spec(name) is not None
        except ModuleNotFoundError:
            found = False
        if not found:
            raise _not_installed(name)


def _not_installed(name: str | None) -> PreconditionError:
    return PreconditionError(
        f"this installation serves packs but cannot make them, for {name} is not installed: pack "
        "where `pip install expertd` brought its dependencies."
    )


def _import_quietly() -> None:
    """Imports what packs, without the warnings that are its authors' to heed.

    Raises :class:`PreconditionError` where a part of it is not installed.
    """
    import importlib
    import logging
    import warnings

    with warnings.catch_warnings(), importing("torch and transformers"):
        warnings.simplefilter("ignore")
        try:
            importlib.import_module("expertd.packing.packer")
        except ModuleNotFoundError as error:
            raise _not_installed(error.name) from error
    logging.getLogger("transformers").setLevel(logging.ERROR)
