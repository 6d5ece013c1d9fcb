"""The advice as people read it, and as programs do."""

from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from expertd.settings.config import name_of_pack
from expertd_inference.advice.advisor import Advice
from expertd_inference.advice.prediction import CONTEXT, Prediction, Processor
from expertd_inference.advice.recommendation import paper_perplexity
from expertd_inference.advice.survey import Survey
from expertd_inference.advice.values import Host
from expertstore.command_line import command, serve_command
from expertstore.sizes import format_bytes
from expertstore.socket_directory import where_to_serve

PROMPT = "Once upon a time"
_MEANING = (
    f"RAM in all: experts, trunk, and {{workers}} worker(s) with {CONTEXT} tokens of context. "
    "Typical: experts asked for as in traces of trained models; worst: each as often as every "
    "other. Tokens/s are of each worker, in decoding."
)


def show(advice: Advice, console: Console) -> None:
    """Host, table, choice, and what to run next."""
    console.print(
        f"{advice.model.name} on this host: {_host_line(advice.host)}",
        soft_wrap=True,
        highlight=False,
    )
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    papers = {need.scheme: paper_perplexity(advice.model.config, need.scheme)
              for need in advice.model.needs}  # fmt: skip
    columns = ["scheme", "experts in RAM", "RAM in all", "tokens/s, typical", "worst", ""]
    for column in columns + ["paper's perplexity"] * any(papers.values()):
        table.add_column(column, justify="left" if column in {"scheme", ""} else "right")
    scheme = None
    for row in advice.rows:
        paper = papers.get(row.scheme)
        table.add_row(
            row.scheme if row.scheme != scheme else "",
            _budget(row),
            format_bytes(row.ram_bytes),
            f"{'at most ' if row.processor is Processor.GPU else ''}{row.typical:.3g}",
            f"{row.worst:.3g}",
            "fits" if row.fits else "too large",
            *([f"{paper:.2f}" if paper and row.scheme != scheme else ""] * any(papers.values())),
            style="bold" if row is advice.recommendation.row else None,
        )
        scheme = row.scheme
    console.print(table)
    for line in notes(advice):
        console.print(line, soft_wrap=True, highlight=False)
    _show_warning(advice.busy, console)
    console.print(f"\n{advice.recommendation.sentence}", soft_wrap=True, highlight=False)
    if commands := next_commands(advice):
        console.print("\nNext:", highlight=False)
        for command in commands:
            console.print(f"  {command}", soft_wrap=True, highlight=False)


def show_survey(survey: Survey, console: Console) -> None:
    """Host, and a line for each model and scheme that fits it."""
    console.print(f"This host: {_host_line(survey.host)}", soft_wrap=True, highlight=False)
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    columns = ("model", "scheme", "experts in RAM", "RAM in all", "tokens/s, typical", "worst")
    for column in columns:
        table.add_column(column, justify="left" if column in {"model", "scheme"} else "right")
    last = ""
    for model, row in survey.rows:
        table.add_row(
            model.name if model.name != last else "",
            row.scheme,
            _budget(row),
            format_bytes(row.ram_bytes),
            f"{row.typical:.3g}",
            f"{row.worst:.3g}",
        )
        last = model.name
    console.print(table)
    console.print(
        f"What fits, the largest model first. {_MEANING.format(workers=survey.host.workers)}",
        soft_wrap=True,
        highlight=False,
    )
    _show_warning(survey.busy, console)
    largest = survey.rows[0][0].name if survey.rows else "SHAPE"
    more = command("expert-run", "advise", "--model", largest)
    console.print(
        f"\nMore about one of them, on a GPU too: {more}",
        soft_wrap=True,
        highlight=False,
    )


def survey_as_json(survey: Survey) -> dict[str, Any]:
    """Bytes, seconds, and tokens per second of each worker."""
    return {
        "host": _host(survey.host),
        "warning": survey.busy,
        "fits": [{"model": model.name, **_row(row)} for model, row in survey.rows],
    }


def as_json(advice: Advice) -> dict[str, Any]:
    """Bytes, seconds, and tokens per second of each worker."""
    host = advice.host
    return {
        "model": advice.model.name,
        "host": _host(host),
        "warning": advice.busy,
        "schemes": {
            need.scheme: {
                "expert_bytes": need.expert_bytes,
                "trunk_bytes": need.trunk_bytes,
                "table_bytes": need.table_bytes,
                "token_bytes": need.token_bytes,
                "kernel_seconds": advice.costs[need.scheme].kernel_seconds,
                "other_seconds": advice.costs[need.scheme].other_seconds,
                "paper_perplexity": paper_perplexity(advice.model.config, need.scheme),
            }
            for need in advice.model.needs
        },
        "predictions": [_row(row) for row in advice.rows],
        "choice": None if advice.recommendation.row is None else _row(advice.recommendation.row),
        "why": advice.recommendation.sentence,
        "next": next_commands(advice),
    }


def notes(advice: Advice) -> list[str]:
    """What the columns mean."""
    found = [
        _MEANING.format(workers=advice.host.workers),
    ]
    if any(paper_perplexity(advice.model.config, need.scheme) for need in advice.model.needs):
        found.append(
            "Perplexity is the paper's, of Mixtral-8x7B on WikiText2 (arXiv 2312.17238), not "
            "measured here; lower is better."
        )
    if any(row.processor is Processor.GPU for row in advice.rows):
        found.append(
            "On the GPU: a bound by its link and memory, all experts in RAM; not a prediction."
        )
    if tables := max(need.table_bytes for need in advice.model.needs):
        found.append(
            f"Its tables take {format_bytes(tables)} on disk; RAM in all has room for a part of "
            "their rows, the rest is read row by row."
        )
    largest = max(
        need.expert_bytes + need.trunk_bytes + need.table_bytes for need in advice.model.needs
    )
    if advice.model.pack is None and largest > advice.host.disk_free_bytes:
        found.append(
            f"{advice.host.storage} has {format_bytes(advice.host.disk_free_bytes)} free, less "
            f"than the largest of these packs ({format_bytes(largest)})."
        )
    return found


def next_commands(advice: Advice) -> list[str]:
    """What to run to have what was chosen; none if nothing was."""
    row, model = advice.recommendation.row, advice.model
    if row is None:
        return []
    short = model.name.rpartition("/")[2].lower()
    pack = model.pack or Path(f"{short}-{row.scheme}")
    name = name_of_pack(Path(short))
    make = command(
        "expertd", "pack", model.checkpoint or "CHECKPOINT", pack, "--scheme", row.scheme
    )
    need = next(need for need in model.needs if need.scheme == row.scheme)
    rows = need.rows_bytes(row.budget_bytes)
    threads, where = str(advice.host.threads), where_to_serve()
    return [
        *([] if model.pack else [make]),
        serve_command(name, pack, row.budget_bytes + rows, *where),
        command(
            *("expert-run", "generate", *where, "--model", name),
            *("--threads", threads, "--prompt", PROMPT),
        ),
    ]


def _host_line(host: Host) -> str:
    return (
        f"{host.workers} worker(s) of {host.threads} threads on {host.cores} cores; memory "
        f"{host.memory_rate_all / 1e9:.0f} GB/s, disk {host.storage_rate / 1e9:.1f} GB/s, "
        f"{format_bytes(host.ram_bytes)} of RAM free"
    )


def _show_warning(warning: str | None, console: Console) -> None:
    if warning is not None:
        console.print(f"\n{warning}", soft_wrap=True, highlight=False, style="bold yellow")


def _host(host: Host) -> dict[str, Any]:
    return {
        "cores": host.cores,
        "threads": host.threads,
        "workers": host.workers,
        "memory_bytes_per_second": host.memory_rate_all,
        "ram_available_bytes": host.ram_bytes,
        "storage": str(host.storage),
        "storage_bytes_per_second": host.storage_rate,
        "storage_free_bytes": host.disk_free_bytes,
        "gpu": None
        if host.gpu is None
        else {
            "memory_bytes": host.gpu.memory_bytes,
            "link_bytes_per_second": host.gpu.link_rate,
            "memory_bytes_per_second": host.gpu.memory_rate,
        },
    }


def _budget(row: Prediction) -> str:
    where = " in the GPU" if row.processor is Processor.GPU else ""
    return f"{format_bytes(row.budget_bytes)} ({row.share:.0%}){where}"


def _row(row: Prediction) -> dict[str, Any]:
    return {
        "scheme": row.scheme,
        "place": row.processor.value,
        "share": row.share,
        "budget_bytes": row.budget_bytes,
        "ram_bytes": row.ram_bytes,
        "fits": row.fits,
        "tokens_per_second": row.typical,
        "tokens_per_second_worst": row.worst,
        "read_bytes_per_token": row.read_bytes,
    }
