"""How a part's own command ends: its figures as they come, then all of them."""

import argparse
import json
import os
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

import torch
import transformers
from rich.console import Console

from bench.figures import Figure
from bench.peer import PeerError
from bench.progress import progress
from bench.store import show

Measure = Callable[[Path, Callable[[str], None]], Iterator[Figure | str]]
"""Gives figures, or why there are none of a kind; told where to write, and what shows its state."""


def report(measure: Measure, title: str, options: argparse.Namespace) -> None:
    """Prints what ``measure`` gives: a table, or with ``options.json`` one JSON object.

    ``options`` are ``threads``, ``dir`` and ``json`` of a part's command. Raises SystemExit with
    one sentence if a peer cannot be measured.
    """
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(options.threads)
    console = Console(stderr=True)
    figures: list[Figure] = []
    with (
        progress(console, "starting") as status,
        tempfile.TemporaryDirectory(prefix="bench-", dir=options.dir) as folder,
    ):
        try:
            for figure in measure(Path(folder), status.update):
                if isinstance(figure, str):
                    console.print(f"not measured: {figure}", highlight=False)
                    continue
                figures.append(figure)
                value = figure.ours if figure.ratio is None else figure.ratio
                console.print(f"  {figure.what}: {value:.3g}", highlight=False)
        except PeerError as error:
            raise SystemExit(f"bench: {error}") from error
    load = os.getloadavg()[0]
    if options.json:
        rows = [asdict(figure) for figure in figures]
        print(json.dumps({"figures": rows, "load_average": load}, indent=1))
    else:
        show(figures, title)
        print(f"{options.threads} threads, load average {load:.1f} on {os.cpu_count()} CPUs")
