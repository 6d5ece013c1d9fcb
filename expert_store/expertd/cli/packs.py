"""``expertd packs``, ``remove``, ``verify`` and ``inspect``: what packs there are, and in them."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer

from expertd.cli.progress import ProgressDisplay
from expertstore.interrupts import interruptible
from expertstore.sizes import format_bytes, size_to_give

_EXIT_DAMAGED = 1

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")]


def register(app: typer.Typer) -> None:
    """Adds the commands to ``app``."""
    commands: tuple[Callable[..., None], ...] = (packs, remove, verify, inspect)
    for command in commands:
        app.command()(command)


def packs(
    directory: Annotated[
        Path | None,
        typer.Option(
            "--dir",
            metavar="DIR",
            readable=False,
            help="Where to look. Default: $EXPERTD_PACKS, else $XDG_DATA_HOME/expertd/packs.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Lists the packs that are there, and what of others is begun, with their sizes.

    Example: `expertd packs`
    """
    from expertd.packing.shelf import list_packs
    from expertstore.pack.place import packs_directory

    place = directory or packs_directory()
    found = list_packs(place)
    if as_json:
        typer.echo(
            json.dumps(
                {
                    "directory": str(place),
                    "packs": [
                        {"name": pack.name, "path": str(pack.path), "state": pack.state}
                        | {"scheme": pack.scheme, "architecture": pack.architecture}
                        | {"num_bytes": pack.num_bytes, "expert_bytes": pack.expert_bytes}
                        for pack in found
                    ],
                },
                indent=1,
            )
        )
        return
    if not found:
        typer.echo(f"{place} has no packs; `expertd pack ORG/NAME` makes one there.")
        return
    from rich.console import Console
    from rich.table import Table

    table = Table(box=None)
    for column in ("pack", "scheme", "on disk", "experts", "state"):
        table.add_column(column, justify="right" if column in {"on disk", "experts"} else "left")
    for pack in found:
        table.add_row(
            pack.name,
            pack.scheme,
            format_bytes(pack.num_bytes),
            format_bytes(pack.expert_bytes) if pack.expert_bytes else "",
            pack.state,
        )
    console = Console()
    console.print(place, highlight=False, soft_wrap=True)
    console.print(table)


def remove(
    names: Annotated[
        list[str],
        typer.Argument(metavar="PACK...", help="Names that `expertd packs` lists, or paths."),
    ],
    directory: Annotated[
        Path | None,
        typer.Option("--dir", metavar="DIR", readable=False, help="Where to look for names."),
    ] = None,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Removes packs from the disk, and what an interrupted packing of them has left.

    A daemon that has the pack open serves it on until it is unloaded; the disk is free after that.

    Example: `expertd remove Qwen3-30B-A3B-4bit`
    """
    from expertd.packing.shelf import find_pack, remove_pack
    from expertstore.pack.place import packs_directory

    found = [find_pack(directory or packs_directory(), name) for name in names]
    total = format_bytes(sum(pack.num_bytes for pack in found))
    if not yes:
        what = ", ".join(str(pack.path) for pack in found)
        typer.confirm(f"Remove {what} ({total})?", abort=True)
    for pack in found:
        remove_pack(pack)
    typer.echo(f"{total} are free again.")


def verify(
    pack: Annotated[
        Path, typer.Argument(metavar="PACK", readable=False, help="The pack's directory.")
    ],
) -> None:
    """Reads a whole pack and checks records, tables and trunk against their checksums.

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
        "tables": [msgspec.to_builtins(table) for table in manifest.tables],
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
        *(
            (
                f"table {table['name']}",
                f"{format_bytes(table['num_bytes'])}, {table['num_rows']} rows of "
                f"{table['num_columns']} values ({table['encoding']}), of which a token reads "
                f"{table['rows_per_token']}",
            )
            for table in report["tables"]
        ),
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
