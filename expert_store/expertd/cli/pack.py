"""``expertd pack``, ``verify`` and ``inspect``: making a pack, checking it, looking into it."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from expertd.cli.progress import ProgressDisplay
from expertstore.command_line import serve_command
from expertstore.errors import PreconditionError
from expertstore.interrupts import importing, interruptible
from expertstore.sizes import format_bytes, size_to_give
from expertstore.socket_directory import where_to_serve

_EXIT_DAMAGED = 1

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    commands: tuple[Callable[..., None], ...] = (pack, verify, inspect)
    for command in commands:
        app.command()(command)


def pack(
    source: Annotated[
        Path,
        typer.Argument(
            metavar="CHECKPOINT",
            readable=False,
            help="Directory of the model in Hugging Face's form (config.json and safetensors).",
        ),
    ],
    destination: Annotated[
        Path,
        typer.Argument(
            metavar="PACK", readable=False, help="Directory to make; its parent must exist."
        ),
    ],
    scheme: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="bf16, 8bit, 4bit, 4bit-fast, mxfp4, paper-3bit or paper-2bit: see above. 4bit "
            "unless given; mxfp4 for a checkpoint that is.",
            show_default=False,
        ),
    ] = None,
    experts: Annotated[
        str | None,
        typer.Option(
            metavar="PRECISION",
            help="Precision of the experts in place of the scheme's: 16, or bits and group size "
            "like 3g64; 2g16m has 8-bit scales.",
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
) -> None:
    """Makes a pack of a checkpoint: quantized expert by expert, ready to serve.

    Schemes, with bits per expert weight (scales included):

    - `bf16` (16): nothing is quantized. Weights keep the checkpoint's own 16-bit type; those of
    a float32 checkpoint become bfloat16.

    - `8bit` (8.25), `4bit` (4.5): experts, attention, dense layers and shared experts, in groups
    of 128 and 64. `4bit-fast` is `4bit` with the output head in 8 bits.

    - `mxfp4` (4.25): experts that come in MXFP4, as GPT-OSS does, stay bit for bit what they are.
    Other schemes make of them what they make of any weights. `--experts mxfp4` keeps them too.

    - `paper-3bit` (3.26), `paper-2bit` (3.03): experts in 3 bits (groups of 64) or 2 bits
    (groups of 16), attention in 4, scales in 8; as in arXiv 2312.17238.

    Embeddings, routers and norms always have 16 bits, and so has a matrix of the trunk whose
    sizes do not fit.

    A few experts are in memory at a time. After an interruption, even a hard one, the same command
    goes on where it was; the work lies in PACK.partial until the pack is whole.

    Example: `expertd pack ~/models/Mixtral-8x7B-v0.1 /packs/mixtral --scheme 4bit`
    """
    from expertd.packing.early import check_early
    from expertd.packing.schemes import choose_scheme, default_scheme
    from expertstore.pack.files import check_path

    check_path(destination.absolute())
    chosen = choose_scheme(scheme or default_scheme(source), experts, attention, dense, head)
    check_early(source, destination, chosen, force=force)
    # torch takes seconds to import: only once the arguments are known to be good.
    _check_installed("torch", "transformers")
    title = f"packing {source.name} as {chosen.name}"
    typer.echo(title, err=True)
    _import_quietly()
    from expertd.packing.packer import Progress, Request
    from expertd.packing.packer import pack as make_pack

    request = Request(
        source,
        destination.absolute(),
        chosen,
        optimize=optimize,
        device=device,
        force=force,
    )
    with interruptible(), ProgressDisplay(title) as display:

        def show(progress: Progress) -> None:
            display.update(
                progress.done_bytes,
                progress.total_bytes,
                f"{progress.done_steps} of {progress.total_steps} tensors and experts",
                skipped=progress.resumed_bytes,
            )

        try:
            make_pack(request, on_progress=show, on_notice=display.note)
        except KeyboardInterrupt:
            display.note("Interrupted; the same command goes on where it was.")
            raise
    from expertd.settings.config import name_of_pack
    from expertstore.pack.inspect import inspect as inspect_pack
    from expertstore.shared.host_memory import default_ram_bytes

    found = inspect_pack(destination)
    typer.echo(
        f"{destination}: {found.manifest.num_experts} experts, "
        f"{format_bytes(found.manifest.expert_bytes)} at {found.expert_bits:.2f} bits per weight, "
        f"and {format_bytes(found.manifest.trunk.num_bytes)} of trunk. The least RAM to serve it "
        f"(one token's experts) is {size_to_give(found.manifest.working_set_bytes)}."
    )
    name = name_of_pack(destination.absolute())
    budget = default_ram_bytes(found.manifest)
    typer.echo(f"Next: {serve_command(name, destination, budget, *where_to_serve())}")


def verify(
    pack: Annotated[
        Path, typer.Argument(metavar="PACK", readable=False, help="The pack's directory.")
    ],
) -> None:
    """Reads a whole pack and checks every record and the trunk against their checksums.

    Lists each damaged record by file, layer and expert. Exit code 0: all is well, 1: something
    is damaged, 2: not a pack.

    Example: `expertd verify /packs/mixtral`
    """
    from expertstore.pack.verify import verify as verify_pack

    with interruptible(), ProgressDisplay(f"verifying {pack}") as display:
        result = verify_pack(pack, lambda done, total: display.update(done, total, ""))
    for damage in result.damages:
        where = damage.file
        if damage.layer is not None:
            where += f", layer {damage.layer}, expert {damage.expert}"
        typer.echo(f"damaged: {where}: {damage.reason}")
    if result.damages:
        typer.echo(
            f"{pack}: {len(result.damages)} damages found; copy or make the pack again. What is "
            "whole can still be served."
        )
        raise typer.Exit(_EXIT_DAMAGED)
    typer.echo(
        f"{pack}: all {result.num_records} records and the trunk are whole "
        f"({format_bytes(result.num_bytes)} read)."
    )


def inspect(
    pack: Annotated[
        Path, typer.Argument(metavar="PACK", readable=False, help="The pack's directory.")
    ],
    as_json: Json = False,
) -> None:
    """Shows what is in a pack: model, scheme, layers, sizes, and the parts of a record.

    Example: `expertd inspect /packs/mixtral`
    """
    report = _report(pack)
    if as_json:
        typer.echo(json.dumps(report, indent=1))
    else:
        _print_report(report)


def _report(pack: Path) -> dict[str, Any]:
    import msgspec

    from expertstore.pack.inspect import inspect as inspect_pack
    from expertstore.pack.inspect import num_weights

    found = inspect_pack(pack)
    manifest = found.manifest
    return {
        "pack": str(pack),
        "architecture": manifest.architecture,
        "model_type": manifest.model_type,
        "scheme": manifest.scheme,
        "dtype": manifest.dtype,
        "gate_order": str(manifest.gate_order),
        "format_version": manifest.format_version,
        "fingerprint": found.pack.fingerprint,
        "num_experts": manifest.num_experts,
        "expert_bytes": manifest.expert_bytes,
        "expert_weights": found.expert_weights,
        "expert_bits_per_weight": round(found.expert_bits, 3),
        "trunk_bytes": manifest.trunk.num_bytes,
        "trunk_weights": found.trunk_weights,
        "trunk_bits_per_weight": round(found.trunk_bits, 3),
        "trunk_quantized_tensors": len(manifest.trunk_quantized),
        "trunk_plain_matrices": [
            {"name": tensor.name, "shape": tensor.shape, "dtype": tensor.dtype,
             "num_bytes": tensor.num_bytes}
            for tensor in found.trunk_plain
        ],
        "working_set_bytes": manifest.working_set_bytes,
        "files": [msgspec.to_builtins(file) for file in (*manifest.files, manifest.trunk)],
        "layers": [
            {
                "layer": layer.layer,
                "num_experts": layer.num_experts,
                "experts_per_token": layer.experts_per_token,
                "layout": layer.layout,
            }
            for layer in manifest.layers
        ],
        "layouts": [
            {**msgspec.to_builtins(layout), "bits_per_weight": round(
                8 * layout.record_bytes / num_weights(layout), 3)}
            for layout in manifest.layouts
        ],
    }  # fmt: skip


def _print_report(report: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    console.print(report["pack"], highlight=False, soft_wrap=True)
    table = Table(show_header=False)
    layers = report["layers"]
    for key, value in (
        ("architecture", report["architecture"]),
        ("scheme", f"{report['scheme']}, 16-bit weights in {report['dtype']}"),
        ("layers with experts", _ranges([layer["layer"] for layer in layers])),
        (
            "experts",
            f"{report['num_experts']} ({_distinct(layers, 'num_experts')} per layer, "
            f"{_distinct(layers, 'experts_per_token')} per token)",
        ),
        (
            "size of the experts",
            f"{format_bytes(report['expert_bytes'])}, "
            f"{report['expert_bits_per_weight']:.2f} bits per weight",
        ),
        (
            "size of the trunk",
            f"{format_bytes(report['trunk_bytes'])}, "
            f"{report['trunk_bits_per_weight']:.2f} bits per weight, "
            f"{report['trunk_quantized_tensors']} matrices quantized",
        ),
        ("of it not quantized", _largest(report["trunk_plain_matrices"])),
        ("least RAM to serve", f"{size_to_give(report['working_set_bytes'])} (one token)"),
        ("fingerprint", report["fingerprint"]),
    ):
        table.add_row(key, value)
    console.print(table)
    for index, layout in enumerate(report["layouts"]):
        of = [layer["layer"] for layer in layers if layer["layout"] == index]
        console.print(
            f"record in layers {_ranges(of)}: {format_bytes(layout['record_bytes'])}, "
            f"{layout['bits_per_weight']:.2f} bits per weight",
            highlight=False,
        )
        parts = Table()
        for column in ("part", "shape", "dtype", "offset", "bytes"):
            parts.add_column(column, justify="right" if column in {"offset", "bytes"} else "left")
        for part in layout["parts"]:
            parts.add_row(
                part["name"],
                " x ".join(map(str, part["shape"])),
                part["dtype"],
                str(part["offset"]),
                str(part["num_bytes"]),
            )
        console.print(parts)


def _ranges(numbers: list[int]) -> str:
    """``[0, 1, 2, 5]`` as ``0-2, 5``."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return ", ".join(f"{run[0]}-{run[-1]}" if run[1:] else str(run[0]) for run in runs)


def _largest(tensors: list[dict[str, Any]], num_shown: int = 2) -> str:
    """The first few of ``tensors`` with their sizes, and how many more there are."""
    shown = [f"{item['name']} ({format_bytes(item['num_bytes'])})" for item in tensors[:num_shown]]
    rest = len(tensors) - len(shown)
    return ", ".join(shown + ([f"{rest} smaller matrices"] if rest else [])) or "no matrix"


def _distinct(layers: list[dict[str, Any]], key: str) -> str:
    return " or ".join(map(str, sorted({layer[key] for layer in layers})))


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
